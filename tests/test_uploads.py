"""Uploads in parts that a killed writer leaves on a real S3 server: found, and ended by who writes there next."""

import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest
from tests.fault_proxy import Proxy
from tests.test_integrity import pack_small

from elastrain import conditional, lease, s3, storage, uploads
from elastrain.data import outcome
from elastrain.data.chunks import Split
from elastrain.errors import SpecError, StorageError
from elastrain.spec.document import read_train
from elastrain.uploads import abort, unfinished

pytestmark = pytest.mark.slow

SPEC = Path(__file__).parents[1] / "pipelines" / "digits_mlp" / "train.yaml"
KILLED = """
import os, signal, sys
from elastrain import s3
files = [s3.client().open_output_stream(s3.place(url)) for url in sys.argv[1:]]
for file in files:
    file.write(bytes(12 << 20))
while True:
    from elastrain.uploads import unfinished
    if all(unfinished(url.rpartition("/")[0]) for url in sys.argv[1:]):
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def root(s3_bucket: str) -> str:
    """An empty folder on the server."""
    return f"{s3_bucket}/{secrets.token_hex(4)}"


def abandon(*urls: str) -> None:
    """Begin large files in a process that is killed before they are whole."""
    environment = {**os.environ, "PYTHONPATH": str(Path(storage.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", KILLED, *urls], env=environment, check=False, timeout=60)
    assert done.returncode == -9


def names(root: str) -> list[str]:
    return sorted(upload.url.removeprefix(f"{root}/") for upload in unfinished(root))


def test_what_a_killed_writer_was_sending_is_found_and_only_ones_own_is_ended(root: str) -> None:
    run = f"{root}/runs/ü and #?%20+"
    abandon(f"{run}/checkpoints/step-1/model", f"{run}/audit/0.parquet", f"{root}/runs/other/checkpoints/x")
    mine = ["audit/0.parquet", "checkpoints/step-1/model"]
    assert names(run) == mine
    assert len(names(root)) == 3
    assert not storage.exists(f"{run}/audit/0.parquet"), "and it shows in no list"
    assert abort([f"{run}/checkpoints", f"{run}/audit"]) == 2
    assert (names(run), len(names(root))) == ([], 1)
    assert abort([f"{run}/checkpoints", f"{root}/runs/oth"]) == 0, "a name that only begins alike is another folder"
    storage.put(f"{run}/checkpoints/step-1/model", bytes(12 << 20))
    assert names(run) == []


def test_a_pack_ends_what_a_killed_one_was_sending_to_the_same_place(root: str) -> None:
    abandon(f"{root}/out/train/data-00000.parquet", f"{root}/out/train-not/data-00000.parquet")
    splits = {"train": Split(columns=(), chunks=(), reader=lambda *_: iter(()))}  # type: ignore[arg-type]
    with outcome.placed(f"{root}/out", {}, splits, {"source": "x", "options": {}}):
        assert names(root) == ["out/train-not/data-00000.parquet"]


def test_a_run_that_starts_ends_what_a_killed_one_was_sending(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from elastrain.elastic import run  # Ray, which the other tests here do without

    def enough(*_: object, **__: object) -> None:
        raise SpecError("that is enough")

    pack_small(f"{root}/data")
    abandon(f"{root}/run/checkpoints/step-1/model", f"{root}/run/audit/0.parquet", f"{root}/run-not/checkpoints/x")
    monkeypatch.setattr(run, "prepare", enough)
    changes = [f"storage={root}", "name=run", f"data.train={root}/data", "data.eval=null"]
    with pytest.raises(SpecError, match="that is enough"):
        run.train(read_train(str(SPEC), changes))
    assert names(root) == ["run-not/checkpoints/x"]


def test_uploads_are_ended_also_where_requests_fail(root: str, fault_proxy: Proxy) -> None:
    abandon(f"{root}/x", f"{root}/y")
    fault_proxy.fault("503", times=2)
    assert abort([root]) == 2
    fault_proxy.fault("reset", times=2)
    assert names(root) == []
    assert fault_proxy.counts()["503"] == fault_proxy.counts()["reset"] == 2


def test_more_uploads_than_one_answer_holds_are_found(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    abandon(*(f"{root}/{number}" for number in range(5)))
    asked, ask = [], uploads._asked

    def in_twos(method: str, path: str, query: dict[str, str], *rest: object) -> bytes:
        asked.append(method)
        return ask(method, path, {**query, "max-uploads": "2"} if method == "GET" else query, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(uploads, "_asked", in_twos)
    assert names(root) == ["0", "1", "2", "3", "4"]
    assert asked == ["GET"] * 3
    assert abort([root]) == 5
    assert names(root) == []


def test_what_may_not_be_looked_at_stops_nothing(root: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    abandon(f"{root}/x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden-and-wrong")
    with pytest.raises(StorageError, match=rf"^cannot look for unfinished uploads in {root}: access denied"):
        unfinished(root)
    assert abort([root]) == 0
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert unfinished(root) == [], "the keys of a machine's role are nobody else's"
    assert unfinished(str(tmp_path)) == []
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(s3, "FIRST_S", 0.5)
    with pytest.raises(StorageError, match=r"unfinished uploads in .*: no proper answer from http://127.0.0.1:9"):
        unfinished(root)


def test_a_profile_whose_keys_a_command_gives_reads_and_writes_everything(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrow, obstore and what signs by itself, with the keys of `credential_process`."""
    keys = {name: os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    said = '{"Version": 1, "AccessKeyId": "%s", "SecretAccessKey": "%s"}' % tuple(keys.values())  # noqa: UP031 -- braces
    (tmp_path / "config").write_text(f"[profile work]\ncredential_process = {sys.executable} {tmp_path}/keys.py\n")
    (tmp_path / "keys.py").write_text(f"print({said!r})\n")
    for name in keys:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_PROFILE", "work")
    storage.put(f"{root}/x", b"1")
    assert conditional.create(f"{root}/y", b"2") is not None
    assert [file.path for file in storage.list_files(root)] == ["x", "y"]
    assert unfinished(root) == []
    lease.taken(f"{root}/run", remedy="").release()
