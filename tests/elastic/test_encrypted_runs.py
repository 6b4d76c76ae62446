"""Encrypted data and checkpoints by the command line: the same bits, and the key is nowhere but with the user."""

import base64
import contextlib
import json
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.elastic.reference import begin_reference
from tests.elastic.test_run import SPEC, wait_for

import elastrain
from elastrain.data.pack import pack_dataset
from elastrain.data.sources import PackOptions
from elastrain.elastic.session import ray_session
from elastrain.errors import StorageError
from elastrain.spec.document import read_train
from elastrain.training.export import export_weights

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

SAME = ("precision=fp32", "consistency=bitwise", "data.slots=5", "audit=true", "budget={epochs: 10}")
STEPS = 230


@pytest.fixture
def ray_files(key: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Ray whose processes have the key, and where it writes: a short path, since its sockets lie there."""
    with tempfile.TemporaryDirectory(prefix="ek", dir="/tmp", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.setenv("ELASTRAIN_KEY_MAIN", base64.b64encode(key).decode())
        with ray_session("local", cpus=4):
            yield Path(folder)


@pytest.fixture
def key() -> bytes:
    """A new one."""
    return os.urandom(32)


def forms_of(key: bytes) -> set[bytes]:
    """How a key might be written: as it is, in hexadecimal digits, in base64, in Python, as a JSON list."""
    text = base64.b64encode(key)
    return {key, key.hex().encode(), text, text.rstrip(b"="), base64.urlsafe_b64encode(key), repr(key)[2:-1].encode()}


def holding(folders: tuple[Path, ...], forms: set[bytes]) -> list[str]:
    """The files below some folders that hold the key in any form, by content or by name."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 30
    held = [path for path in files if any(form in path.read_bytes() + os.fsencode(path) for form in forms)]
    return [str(path) for path in held]


def command_lines(root: int) -> bytes:
    """The arguments of a process and of whatever it has started."""
    listed = subprocess.run(["/bin/ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(pid): int(parent) for pid, parent in map(str.split, listed.splitlines())}
    found = b""
    for pid in parents:
        above = pid
        while above in parents and above != root:
            above = parents[above]
        if above == root:
            with contextlib.suppress(OSError):  # ended meanwhile
                found += Path(f"/proc/{pid}/cmdline").read_bytes()
    return found


def test_an_encrypted_run_that_is_interrupted_goes_on_to_the_bits_of_a_plain_one(
    cli: Callable[..., Any],
    start: Callable[..., Any],
    workspace: Path,
    key: bytes,
    ray_files: Path,
    slow_task: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    packed = pack_dataset("digits", str(workspace / "held"), PackOptions(encrypt="main"))
    plain = json.loads((workspace / "data" / "digits" / "train" / "_manifest.json").read_text())
    assert packed["splits"]["train"]["fingerprint"] == plain["fingerprint"]

    def sets(data: str, *changes: str) -> list[str]:
        places = (f"data.train={workspace}/{data}/train", f"data.eval={workspace}/{data}/test")
        return [*SAME, *places, f"storage={workspace}/runs", *changes]

    encrypted = sets("held", "name=held", "checkpoint={every_steps: 10, encrypt: main}", f"task={slow_task}:Slow")
    encrypted.append("task_args={pause: 0.1}")
    undisturbed = begin_reference(SPEC, [*SAME, "workers.max=1"], cwd=workspace)
    two = [word for change in (*encrypted, "workers={min: 2, max: 2}") for word in ("--set", change)]
    run = workspace / "runs" / "held"
    process = start("train", SPEC, *two, "--address", ray.get_runtime_context().gcs_address)
    wait_for(lambda: (run / "checkpoints/step-00000020/manifest.json").exists() or process.poll() is not None)
    arguments = command_lines(os.getpid())
    process.send_signal(signal.SIGINT)
    out, said = process.communicate()
    assert process.returncode == 130, said
    assert b"raylet" in arguments
    slow_task.with_name("fast").touch()
    went_on = elastrain.train(read_train(SPEC, encrypted))
    assert 20 <= went_on.result["resumed_from"] < went_on.step == STEPS, said
    assert went_on.weights_sha256 == undisturbed.weights_sha256()

    exported = json.loads(cli("export", str(run), "weights.safetensors", "--json").stdout)
    assert exported["weights_sha256"] == went_on.weights_sha256
    page = cli("report", str(run))
    everything = out + said + json.dumps(packed) + page.stdout + page.stderr
    check_canary(forms_of(key), arguments + everything.encode(), workspace, ray_files)
    check_without_the_key(cli, run, encrypted, monkeypatch)
    monkeypatch.setenv("ELASTRAIN_KEY_MAIN", base64.b64encode(key).decode())
    again = elastrain.train(read_train(SPEC, encrypted))
    assert again.result["resumed_from"] == STEPS, "no wrong key has spoiled it"


def check_canary(forms: set[bytes], shown: bytes, workspace: Path, ray_files: Path) -> None:
    """The key is in nothing that was shown and in no file of the runs or of Ray; the checkpoints are encrypted."""
    assert [form for form in forms if form in shown] == []
    assert holding((workspace, ray_files), forms) == []
    for form in forms:
        (workspace / "canary").write_bytes(b"..." + form + b"...")
        assert holding((workspace, ray_files), forms) == [str(workspace / "canary")], "the test can see a key"
    (workspace / "canary").unlink()
    files = list(workspace.glob("runs/held/checkpoints/*/*-*"))
    assert len(files) >= 9
    assert all(path.read_bytes().startswith(b"elastrain-encrypted 1\n") for path in files)


def check_without_the_key(
    cli: Callable[..., Any], run: Path, encrypted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever needs the key says so in one sentence; a command, on a Ray that has no other key, ends with 5."""
    reading = [change for change in encrypted if not change.startswith("checkpoint=")]  # which would ask for it at once
    actions: list[Callable[[], Any]] = [
        lambda: elastrain.train(read_train(SPEC, reading)),
        lambda: export_weights(str(run), str(run / "x"), step=None, weights="model"),
    ]
    for key, told in (("", "no key 'main'"), ("A" * 43 + "=", "does not open what was")):
        monkeypatch.setenv("ELASTRAIN_KEY_MAIN", key)
        for action in actions:
            with pytest.raises(StorageError, match=rf"^\S+ is encrypted: .*{told}"):
                action()
    on_plain_data = [change.replace("/held/", "/data/digits/") for change in reading]
    done = cli(
        "train", SPEC, *(word for change in (*on_plain_data, "budget={epochs: 11}") for word in ("--set", change))
    )
    assert done.returncode == 5, done.stderr
    assert re.match(r"elastrain: error: \S+ is encrypted: .*does not open what was", done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr
