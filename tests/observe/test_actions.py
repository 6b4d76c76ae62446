"""The actions of a storage: who, what and when, in a folder and on S3, never written again, and shown by a verb."""

import getpass
import json
import os
import re
import secrets
import socket
import threading
from datetime import datetime, tzinfo
from pathlib import Path

import pytest
from typer.testing import CliRunner

from elastrain import conditional, storage
from elastrain.__main__ import app
from elastrain.errors import StorageError
from elastrain.observe import actions
from elastrain.observe.actions import as_text, note, read_actions


def test_entries_say_who_did_what_when_and_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = str(tmp_path / "runs" / "digits")
    note(run, "start", attempt=0, step=0)
    monkeypatch.setenv(actions.ASKED_BY, "alice@laptop")
    monkeypatch.setenv(actions.JOB, "digits-1")
    note(run, "stop", step=7)
    first, second = read_actions(str(tmp_path / "runs"))
    me = {"user": getpass.getuser(), "host": socket.gethostname(), "pid": os.getpid()}
    assert first == {"at": first["at"], "action": "start", "run": run, **me, "attempt": 0, "step": 0}
    asked = {"asked_by": "alice@laptop", "job": "digits-1"}
    assert second == {"at": second["at"], "action": "stop", "run": run, **me, **asked, "step": 7}
    assert first["at"] < second["at"]
    files = sorted((tmp_path / "runs" / ".actions").iterdir())
    assert [path.stat().st_mode & 0o777 for path in files] == [0o444, 0o444]
    assert not (tmp_path / "runs" / "digits").exists(), "an entry makes no run"
    lines = as_text([first, second]).splitlines()
    assert re.search(rf"Z  {getpass.getuser()}@{socket.gethostname()} +start  digits  attempt 0, step 0$", lines[0])
    assert "alice@laptop" in lines[1]
    assert lines[1].endswith("stop   digits  step 7, job digits-1")


def test_many_who_write_at_the_same_moment_lose_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Still(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Still":
            return cls(2026, 11, 27, 17, tzinfo=tz)

    monkeypatch.setattr(actions, "datetime", Still)
    threads = [threading.Thread(target=note, args=(str(tmp_path / f"run-{n}"), "start")) for n in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [entry["run"].rpartition("-")[2] for entry in read_actions(str(tmp_path))]
    assert sorted(found, key=int) == [str(n) for n in range(32)]


def test_the_verb_prints_a_table_or_json_and_nothing_is_no_error(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["audit", str(tmp_path)])
    assert (done.exit_code, done.stdout) == (0, "nobody has done anything here yet\n")
    note(str(tmp_path / "digits"), "delete")
    found = json.loads(CliRunner().invoke(app, ["audit", str(tmp_path), "--json"]).stdout)
    assert [entry["action"] for entry in found["actions"]] == ["delete"]
    assert found["storage"] == str(tmp_path)
    done = CliRunner().invoke(app, ["audit", "s3://key:hidden@bucket/runs"])
    assert isinstance(done.exception, StorageError)
    assert "hidden" not in str(done.exception)


def test_what_is_no_entry_is_named(tmp_path: Path) -> None:
    (tmp_path / ".actions").mkdir()
    (tmp_path / ".actions" / "x.json").write_text("[]")
    with pytest.raises(StorageError, match=r"x.json: not an entry"):
        read_actions(str(tmp_path))


@pytest.mark.slow
def test_on_s3_an_entry_is_created_and_never_replaced(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where = f"{s3_bucket}/{secrets.token_hex(4)}"
    assert read_actions(where) == []
    note(f"{where}/digits", "start", attempt=0)
    note(f"{where}/digits", "resume", attempt=1)
    assert [entry["action"] for entry in read_actions(where)] == ["start", "resume"]
    # Whatever the name comes to, what is there stays.
    (first, _) = storage.list_files(f"{where}/.actions")
    url = f"{where}/.actions/{first.path}"
    before = conditional.read(url).data
    monkeypatch.setattr(storage, "join", lambda *_: url)
    with pytest.raises(StorageError, match="another entry of this name"):
        note(f"{where}/digits", "delete")
    assert conditional.read(url).data == before


def test_a_folder_that_is_not_there_is_no_storage_without_actions(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="runz: no such folder; give what the specs of runs call storage"):
        read_actions(str(tmp_path / "runz"))
