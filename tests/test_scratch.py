"""The folder of a process: its own, there while it lives, gone after any end of it."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from elastrain.scratch import scratch_folder

HOLD = """
import os, sys
from elastrain.scratch import scratch_folder
(scratch_folder() / "left").write_text("x")
assert scratch_folder() == scratch_folder()
if os.fork() == 0:
    assert not any(scratch_folder().iterdir()), "a fork has its own"
    sys.exit()
os.wait()
assert (scratch_folder() / "left").exists(), "and leaves ours alone"
print(scratch_folder(), flush=True)
sys.stdin.read()
"""


def test_a_killed_process_leaves_a_folder_that_the_next_one_removes(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}

    def begun() -> tuple[subprocess.Popen[str], Path]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert process.stdout
        return process, Path(process.stdout.readline().strip())

    killed, left = begun()
    living, held = begun()
    assert (left / "left").exists()
    assert (held / "left").exists()
    assert left.parent.stat().st_mode & 0o777 == 0o700
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert (left / "left").exists()
    third, other = begun()
    assert not left.exists()
    assert (held / "left").exists(), "who lives keeps his"
    for process, folder in ((living, held), (third, other)):
        process.communicate("")
        assert process.returncode == 0
        assert not folder.exists()


def test_a_folder_that_cannot_be_made_is_an_error_of_the_system(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    scratch_folder.__globals__["_made"].cache_clear()
    try:
        with pytest.raises(OSError, match="missing"):
            scratch_folder()
    finally:
        scratch_folder.__globals__["_made"].cache_clear()
