"""The host without Ray around it: what workers report and what the membership tells meet in it."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elastrain import storage
from elastrain.elastic.host import Host
from elastrain.elastic.protocol import Roster, Worker
from elastrain.errors import ConflictError
from elastrain.lease import Hold
from elastrain.lock import locked
from elastrain.observe.ledger import read_ledger, read_steps


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Any]:
    """A host whose first generation is one worker."""
    roster = Roster(minimum=1, maximum=2, initial=1, lease_s=60.0)
    made: Any = Host(Hold(str(tmp_path)), 0, roster, 0, alike=False, timeout_s=60.0)
    made.open()
    roster.enter(Worker(name="a", node="n", place=0, door=("", 0)), None, 0.0)
    yield made
    made.close("done", {})


def status(*steps: int, generation: int = 1, lead: bool = True) -> dict[str, Any]:
    """A report of these steps."""
    lines = [(float(step), 0.0, 8.0, 0.5, 0.1, 1.0, 100.0 + step) for step in steps]
    return {"step": max(steps, default=0) + 1, "spent": {}, "lead": lead, "generation": generation, "lines": lines}


def told(host: Any) -> threading.Thread:
    """Tell the host of something; return the thread that does, when it has or cannot."""
    thread = threading.Thread(target=host.note, args=("worker_lost", {"worker": "b"}), daemon=True)
    thread.start()
    thread.join(10)
    return thread


def test_a_report_and_an_event_of_the_membership_do_not_wait_for_each_other(host: Any) -> None:
    """The membership tells of a loss under its lock, which a report needs to be let in."""
    membership = host.membership
    with membership._lock:
        reporting = threading.Thread(target=host.report, args=("a", status(0)), daemon=True)
        reporting.start()
        reporting.join(0.3)
        assert reporting.is_alive(), "it waits for the membership"
        telling = told(host)
        assert not telling.is_alive(), "it is not waited for"
    reporting.join(10)
    assert host.poll()["last"]["step"] == 0


def test_nobody_who_reports_or_asks_waits_for_storage(host: Any) -> None:
    with host._writing:  # as while records are written
        writing = threading.Thread(target=host.sync, args=("a",), daemon=True)
        writing.start()
        writing.join(0.3)
        assert writing.is_alive(), "who wants it written waits"
        assert not told(host).is_alive()
        asking = threading.Thread(
            target=lambda: (host.report("a", status(0)), host.audit([]), host.poll()), daemon=True
        )
        asking.start()
        asking.join(5)
        assert not asking.is_alive()
    writing.join(10)
    assert not writing.is_alive()


def test_lines_are_kept_once_and_only_from_the_newest_generation(host: Any, tmp_path: Path) -> None:
    host.report("a", status(0, 1))
    host.report("a", status(1, 2))
    host.report("a", status(3, generation=2))
    assert host.poll()["last"]["step"] == 2
    assert host.sync("a")
    assert not host.sync("a stranger"), "who is no member writes no checkpoint"
    host.note("checkpoint", {"step": 3})
    assert host.poll()["checkpoint"] == 3
    host.close("done", {})
    assert read_steps(str(tmp_path / "metrics"))["step"].to_pylist() == [0, 1, 2]
    assert [record["kind"] for record in read_ledger(str(tmp_path))][:2] == ["checkpoint", "end"]


@pytest.mark.parametrize("where", ["local", pytest.param("s3", marks=pytest.mark.slow)])
def test_of_a_run_that_was_taken_over_nothing_more_is_written(
    where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """On a local folder, too: the host of a killed driver lives on for seconds."""
    run = str(tmp_path) if where == "local" else f"{request.getfixturevalue('s3_bucket')}/taken-over"
    roster = Roster(minimum=1, maximum=2, initial=1, lease_s=60.0)
    with locked(run, remedy="") as hold:
        host: Any = Host(hold, 0, roster, 0, alike=False, timeout_s=60.0)
        host.open()
        roster.enter(Worker(name="a", node="n", place=0, door=("", 0)), None, 0.0)
        host.report("a", status(0))
        assert host.sync("a")
        storage.put_json(f"{run}/.lock", {"token": "another", "pid": 7, "user": "who", "host": "came"})
        host.report("a", status(1))
        assert not host.sync("a"), "its checkpoint may not exist"
        assert host.poll()["failure"][0] == "ConflictError"
        assert "was taken over by process 7 of who on came" in host.poll()["failure"][1]
        with pytest.raises(ConflictError):
            host.close("done", {})
    assert read_steps(f"{run}/metrics")["step"].to_pylist() == [0]
