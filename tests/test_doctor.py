"""What `doctor` finds out about machines and storage, good ones and bad ones, and that it leaves nothing."""

import contextlib
import json
import os
import secrets
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from tests.bad_gateway import bad_gateway
from typer.testing import CliRunner

from elastrain import doctor, storage
from elastrain.__main__ import app
from elastrain.doctor import Doubt, as_text, examine, failure
from elastrain.errors import ResourceError, StorageError

MACHINE = ["python", "ray", "torch", "pyarrow", "obstore", "cpus", "open files", "shared memory", "disk"]
S3 = ["clock", "put", "get", "range", "list", "large file", "create-only", "compare-and-swap", "remove"]


def states(found: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["state"] for check in found["checks"]}


def text_of(found: dict[str, Any], name: str) -> str:
    return next(str(check["found"]) for check in found["checks"] if check["name"] == name)


def objects(url: str) -> list[str]:
    """What is below a URL, hidden or not; a server may keep empty folders, which are no objects."""
    with contextlib.suppress(FileNotFoundError):
        return [file.path for file in storage._remote_files(url)]
    return []


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No look at this machine, whose libraries take seconds to load."""
    monkeypatch.setattr(doctor, "_machine", list)


# --- the machine


@pytest.mark.slow
def test_this_machine_and_a_folder_of_it_are_well_and_left_as_they_were(tmp_path: Path) -> None:
    found = examine(str(tmp_path / "new"))
    assert list(states(found)) == [
        *MACHINE,
        *("put", "get", "range", "list", "large file", "lock", "disk there", "remove"),
    ]
    assert found["ok"], as_text(found)
    assert found["exit_code"] == 0
    assert failure(found) is None
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").write_text("stays")
    assert examine(str(tmp_path))["ok"]
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_what_is_wrong_with_a_machine_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_wheel.py").write_text("raise OSError('libcudart.so: cannot open')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ResourceError, match=r"cannot be imported \(OSError\('libcudart.so"):
        doctor._library("broken_wheel")
    with pytest.raises(Doubt, match=r"not there .* Ray puts its object store on the disk"):
        doctor._shared_memory(str(tmp_path / "shm"))
    monkeypatch.setattr(doctor, "LEAST_BYTES", 1 << 60)
    with pytest.raises(ResourceError, match="no room for a run"):
        doctor._disk(str(tmp_path))
    monkeypatch.setattr(doctor, "FILES", 1 << 40)
    with pytest.raises(Doubt, match=r"ulimit|any number"):
        raise Doubt(doctor._open_files())


@pytest.mark.usefixtures("machine")
def test_a_failure_has_the_exit_code_of_its_kind_and_prints_the_table_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    done = CliRunner().invoke(app, ["doctor", f"{tmp_path}/file/x", "--json"])
    assert isinstance(done.exception, StorageError)
    assert str(done.exception) == "1 of 1 checks failed (put): see the table"
    found = json.loads(done.stdout)
    assert (found["ok"], found["exit_code"], states(found)) == (False, 5, {"put": "fail"})
    assert "a part of the path is a file" in text_of(found, "put")
    done = CliRunner().invoke(app, ["doctor", f"{tmp_path}/file/x"])
    assert done.stdout.startswith("fail  put  cannot write")
    monkeypatch.setattr(doctor, "LEAST_BYTES", 1 << 60)
    done = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert isinstance(done.exception, ResourceError)
    done = CliRunner().invoke(app, ["doctor", "s3://key:hidden@bucket/x"])
    assert isinstance(done.exception, StorageError)
    assert "hidden" not in str(done.exception) + done.stdout


# --- S3


@pytest.mark.slow
@pytest.mark.usefixtures("machine")
def test_a_good_server_is_well_and_left_as_it_was(s3_bucket: str) -> None:
    url = f"{s3_bucket}/{secrets.token_hex(4)}"
    found = examine(url)
    assert states(found) == dict.fromkeys(S3, "ok"), as_text(found)
    assert objects(url) == []


@pytest.mark.slow
@pytest.mark.usefixtures("machine")
def test_a_gateway_that_lets_everybody_win_is_found_out(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url, server = f"{s3_bucket}/{secrets.token_hex(4)}", os.environ["AWS_ENDPOINT_URL"]
    with bad_gateway(server, dropped=("if-none-match", "if-match")) as gateway:
        monkeypatch.setenv("AWS_ENDPOINT_URL", gateway)
        found = examine(url)
    assert [name for name, state in states(found).items() if state != "ok"] == ["create-only", "compare-and-swap"]
    assert "writers won a write that one may win: this store cannot keep two runs" in text_of(found, "create-only")
    assert "does not honour conditional writes" in text_of(found, "compare-and-swap")
    assert isinstance(failure(found), StorageError)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    assert objects(url) == []


@pytest.mark.slow
@pytest.mark.usefixtures("machine")
def test_other_bytes_than_were_put_are_found_out(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url, server = f"{s3_bucket}/{secrets.token_hex(4)}", os.environ["AWS_ENDPOINT_URL"]
    with bad_gateway(server, spoiled="/large") as gateway, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", gateway)
        found = examine(url)
    assert [name for name, state in states(found).items() if state != "ok"] == ["large file"]
    assert "came back as other bytes" in text_of(found, "large file")


@pytest.mark.slow
@pytest.mark.usefixtures("s3_bucket")
@pytest.mark.parametrize(
    ("off_s", "kind", "words"),
    [
        (-20 * 60, StorageError, r"120\d s ahead of 127.0.0.1:\d+, which refuses all requests"),
        (5 * 60, Doubt, r"(299|300) s behind .* from 15 minutes on"),
    ],
)
def test_a_clock_that_is_off_is_told(
    off_s: float, kind: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    date = formatdate(time.time() + off_s, usegmt=True)
    with bad_gateway(os.environ["AWS_ENDPOINT_URL"], date=date) as gateway:
        monkeypatch.setenv("AWS_ENDPOINT_URL", gateway)
        with pytest.raises(kind, match=words):
            doctor._clock()


@pytest.mark.slow
@pytest.mark.usefixtures("machine")
def test_nobody_who_answers_is_told_within_seconds(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    start = time.monotonic()
    found = examine(f"{s3_bucket}/x")
    assert states(found) == {"clock": "fail", "put": "fail"}
    assert "no answer from 127.0.0.1:9" in text_of(found, "clock")
    assert time.monotonic() - start < 15
