"""One writer a folder, whatever becomes of it."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from elastrain import storage
from elastrain.errors import ConflictError, StorageError
from elastrain.lease import Hold
from elastrain.lock import locked
from elastrain.training.manifests import folder, newest_whole, revoke, write_manifest

HOLD = """
import sys
from elastrain.lock import locked
with locked(sys.argv[1], remedy=""):
    print("held", flush=True)
    input()
"""


def test_the_lock_of_a_dead_owner_is_taken_over_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    words = rf"{tmp_path}: in use by process {process.pid} on .*; wait for it, stop it, or go away$"
    with pytest.raises(ConflictError, match=words), locked(str(tmp_path), remedy="go away"):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (tmp_path / ".lock").exists()
    with locked(str(tmp_path), remedy=""):
        pass


def test_nothing_is_left_of_a_lock(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(str(tmp_path / "new"), remedy=""):
        raise KeyError([path.name for path in (tmp_path / "new").iterdir()])
    assert list((tmp_path / "new").iterdir()) == []


def test_a_lock_that_was_opened_before_its_owner_removed_it_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one who holds the removed file, and one who makes the next, would both go on."""
    path, opened = tmp_path / ".lock", []
    os_open = os.open

    def slow(name: Path, *rest: int) -> int:
        opened.append(os_open(name, *rest))
        if len(opened) == 1:
            path.unlink()
        return opened[-1]

    monkeypatch.setattr(os, "open", slow)
    with locked(str(tmp_path), remedy=""):
        assert len(opened) == 2
        assert os.path.samestat(path.stat(), os.fstat(opened[1]))
        with pytest.raises(ConflictError), locked(str(tmp_path), remedy=""):
            pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=f"cannot write {tmp_path}/file"), locked(f"{tmp_path}/file", remedy=""):
        pass


def test_other_remote_folders_are_not_locked_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with locked("memory://lock", remedy=""), locked("memory://lock", remedy=""):
        pass
    assert caplog.text.count("memory://lock: this kind of URL has no lock; see to it yourself that no other") == 2


def test_what_outlives_a_dead_owner_cannot_write_once_another_holds_the_folder(tmp_path: Path) -> None:
    """As Ray's processes do, by seconds: not even who has looked before, and writes after."""
    root = str(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", HOLD, root], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    left = Hold(root, json.loads((tmp_path / ".lock").read_text())["token"])
    process.kill()
    process.communicate()
    write_manifest(root, 1, {}, {}, left.check)
    storage.put(f"{folder(root, 2)}/begun", b"")
    with contextlib.ExitStack() as stack:

        def settle() -> None:
            left.check()
            hold = stack.enter_context(locked(root, remedy=""))
            revoke(root)
            hold.check()

        words = rf"^{root}: was taken over by process {os.getpid()} of "
        with pytest.raises(ConflictError, match=words):
            write_manifest(root, 2, {}, {}, settle)
        assert newest_whole(root, warn=pytest.fail) == 1
        write_manifest(root, 2, {}, {})  # who holds the folder may
        assert newest_whole(root, warn=pytest.fail) == 2
    with pytest.raises(ConflictError, match="was given back or removed"):
        left.check()


def test_a_checkpoint_is_committed_on_a_file_system_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    write_manifest(str(tmp_path), 1, {}, {})
    assert newest_whole(str(tmp_path), warn=pytest.fail) == 1
    assert [path.name for path in Path(folder(str(tmp_path), 1)).iterdir()] == ["manifest.json"]
