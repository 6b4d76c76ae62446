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
from tests.elastic.test_run import BITWISE, SPEC, audit_files, result, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

TWO = (*BITWISE, "--set", "workers={min: 2, max: 2}", "--set", "audit=true", "--set", "budget={epochs: 20}")
HELD = ("--set", "data.train=held/train", "--set", "data.eval=held/test")


@pytest.fixture
def ray_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where Ray keeps its logs and whatever else it writes: a short path, since its sockets lie there."""
    with tempfile.TemporaryDirectory(prefix="ek", dir="/tmp", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield Path(folder)


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
    ray_files: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = os.urandom(32)
    monkeypatch.setenv("ELASTRAIN_KEY_MAIN", base64.b64encode(key).decode())
    packed = cli("pack", "digits", "held", "--encrypt", "main", "--json")
    plain = json.loads((workspace / "data" / "digits" / "train" / "_manifest.json").read_text())
    assert result(packed)["splits"]["train"]["fingerprint"] == plain["fingerprint"]

    encrypted = (*TWO, *HELD, "--set", "name=held", "--set", "checkpoint={every_steps: 20, encrypt: main}")
    run = workspace / "runs" / "held"
    process = start("train", SPEC, *encrypted)
    wait_for(lambda: (run / "checkpoints/step-00000100/manifest.json").exists() or process.poll() is not None)
    arguments = command_lines(process.pid)
    process.send_signal(signal.SIGINT)
    out, said = process.communicate()
    assert process.returncode == 130, said
    assert b"raylet" in arguments
    went_on = result(cli("train", SPEC, *encrypted))
    assert went_on["resumed_from"] >= 100, said
    undisturbed = result(
        cli("train", SPEC, *TWO, "--set", "name=beside-encrypted", "--set", "workers={min: 1, max: 1}")
    )
    assert went_on["weights_sha256"] == undisturbed["weights_sha256"]
    assert audit_files(str(run)) == audit_files(undisturbed["run"])

    exported = json.loads(cli("export", str(run), "weights.safetensors", "--json").stdout)
    assert exported["weights_sha256"] == undisturbed["weights_sha256"]
    page = cli("report", str(run))
    everything = out + said + packed.stdout + packed.stderr + page.stdout + page.stderr
    check_canary(forms_of(key), arguments + everything.encode(), workspace, ray_files)
    check_without_the_key(cli, run, monkeypatch)
    monkeypatch.setenv("ELASTRAIN_KEY_MAIN", base64.b64encode(key).decode())
    assert result(cli("train", SPEC, *encrypted))["resumed_from"] == went_on["step"], "no wrong key has spoiled it"


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


def check_without_the_key(cli: Callable[..., Any], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command that needs the key says so in one sentence and ends with 5."""
    on_plain_data = ("train", SPEC, *TWO, "--set", "name=held", "--set", "budget={epochs: 21}")
    wrong = ("train", SPEC, *TWO, *HELD), ("export", str(run), "x"), on_plain_data
    for key, told, commands in (("", "no key 'main'", wrong[:2]), ("A" * 43 + "=", "does not open what was", wrong)):
        monkeypatch.setenv("ELASTRAIN_KEY_MAIN", key)
        for command in commands:
            done = cli(*command)
            assert done.returncode == 5, done.stderr
            line = done.stderr.splitlines()[-1]
            assert re.match(r"elastrain: error: \S+ is encrypted: ", line), line
            assert told in line
            assert "Traceback" not in done.stderr
