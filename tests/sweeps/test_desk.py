"""The desk brings trials and cells together: whatever dies, stops or comes late, each trial ends once."""

import asyncio
import json
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from tests.sweeps.desk_stage import Stage, evaluation, settle

from elastrain.errors import ConflictError, StorageError
from elastrain.lease import Hold
from elastrain.lock import locked
from elastrain.observe.ledger import read_ledger
from elastrain.sweeps import desk as desk_module
from elastrain.sweeps.desk import GO_ON, LEAVE, MAX_LOSSES, STOP


def stage_test(test: Callable[[Stage], Coroutine[Any, Any, None]]) -> Callable[[Any], None]:
    """Run a test on a stage of its own, in a loop of its own."""

    def runs(tmp_path: Any) -> None:
        asyncio.run(test(Stage(str(tmp_path))))

    runs.__name__ = test.__name__
    return runs


@stage_test
async def test_a_trial_goes_to_a_cell_is_decided_on_and_ends(on: Stage) -> None:
    told = on.begin("a")
    (order,) = await on.cell("x")
    task = await on.soon(order)
    assert (task.order.trial, task.order.resume) == ("a", None)
    word = on.decides("x", "a", 20)
    message = await on.soon(told)
    assert (message["step"], message["value"], message["device_s"], message["outcome"]) == (20, 0.5, 2.0, "")
    assert not word.done()
    told = on.goes_on("a")
    assert await on.soon(word) == GO_ON
    await on.desk.over("x", "a", "finished", {"step": 60, "device_s": 6.5})
    message = await on.soon(told)
    assert (message["outcome"], message["step"], message["device_s"]) == ("finished", 60, 6.5)
    assert await on.outcomes() == {"a": ["finished"]}


@stage_test
async def test_a_trial_that_is_pruned_hands_its_cell_to_the_next_in_the_same_group(on: Stage) -> None:
    told, _ = on.begin("a"), on.begin("b")
    orders = await on.cell("x", 2)
    first = [await on.soon(order) for order in orders]
    assert {task.generation for task in first} == {1}
    word = on.decides("x", "a", 20)
    await on.soon(told)
    await on.desk.leave("a", "pruned")
    assert await on.soon(word) == STOP
    await on.desk.over("x", "a", "", {})
    tasks = [on.takes("x", rank, held=1) for rank in range(2)]
    second = [await on.soon(task) for task in tasks]
    assert {(task.order.trial, task.generation) for task in second} == {("b", 1)}
    assert await on.outcomes() == {"a": ["pruned"]}


@stage_test
async def test_a_group_that_somebody_left_unheard_is_never_used_again(on: Stage) -> None:
    """Rank 1 has lost its group after rank 0 said how the trial ended: the next one runs in a new group."""
    on.begin("a"), on.begin("b")
    orders = await on.cell("x", 2)
    assert [(await on.soon(order)).generation for order in orders] == [1, 1]
    await on.desk.over("x", "a", "finished", {"step": 60, "device_s": 1.0})
    await on.desk.lost("x", "a", "a sum broke")  # too late to count
    tasks = [on.takes("x", 0, held=1), on.takes("x", 1, held=None)]
    assert [(await on.soon(task)).generation for task in tasks] == [2, 2]


@stage_test
async def test_a_broken_group_is_never_used_again_whoever_says_to_be_in_it(on: Stage) -> None:
    on.begin("a")
    await on.cell("x", 2)
    await on.desk.lost("x", "a", "a sum broke")
    await settle()
    tasks = [on.takes("x", rank, held=1) for rank in range(2)]
    assert [(await on.soon(task)).generation for task in tasks] == [2, 2]


@stage_test
async def test_a_replaced_worker_gets_the_trial_back_into_the_queue_from_its_newest_checkpoint(on: Stage) -> None:
    told = on.begin("a")
    on.begin("b")
    orders = await on.cell("x", 2)
    await on.soon(orders[0])
    await on.desk.evaluated("x", "a", evaluation(40))
    look = asyncio.create_task(on.desk.look("x", "a", 1))
    on.saved["a"] = 30
    await on.joins("x", 1, 2)
    assert await on.soon(look) == LEAVE  # who is left waits in a sum for one that is gone
    await settle()
    tasks = [on.takes("x", rank) for rank in range(2)]
    task = await on.soon(tasks[0])
    assert (task.order.trial, task.order.resume, task.generation) == ("a", ("trials/a", 30), 2)
    assert task.order.spent_s == pytest.approx(3.0)  # three quarters of what it had cost up to 40
    assert not told.done()
    assert (await on.events("lost"))[0]["reason"] == "worker 1 was replaced"


@stage_test
async def test_what_a_former_attempt_says_late_changes_nothing(on: Stage) -> None:
    told = on.begin("a")
    await on.cell("x", 2)
    await on.joins("x", 1, 2)
    await settle()
    (order,) = await on.cell("y")
    assert (await on.soon(order)).order.trial == "a"
    stale = on.decides("x", "a", 40, value=0.1)
    assert await on.soon(stale) == STOP
    await on.desk.evaluated("x", "a", evaluation(40, 0.1))
    await on.desk.over("x", "a", "finished", {"step": 60, "device_s": 1.0})
    await on.desk.lost("x", "a", "late")
    assert await on.events("eval") == []
    assert await on.outcomes() == {}
    word = on.decides("y", "a", 20)
    assert (await on.soon(told))["step"] == 20
    on.goes_on("a")
    assert await on.soon(word) == GO_ON


@stage_test
async def test_nothing_is_decided_on_twice(on: Stage) -> None:
    """Its cell is lost while Tune thinks: the word counts for what follows, wherever that is."""
    told = on.begin("a")
    orders = await on.cell("x")
    await on.soon(orders[0])
    word = on.decides("x", "a", 20)
    await on.soon(told)
    await on.joins("x")
    assert await on.soon(word) == STOP
    await settle()
    task = await on.soon(on.takes("x"))
    assert (task.order.resume, task.order.decided) == (None, 20)
    told = on.goes_on("a")
    word = on.decides("x", "a", 40)
    assert (await on.soon(told))["step"] == 40
    assert not word.done()


@stage_test
async def test_a_word_is_on_what_was_told_first(on: Stage) -> None:
    told = on.begin("a")
    await on.cell("x")
    first = on.decides("x", "a", 20)
    await on.soon(told)
    await on.joins("x")
    await settle()
    await on.soon(on.takes("x"))
    second = on.decides("x", "a", 40)
    await settle()
    assert (await on.soon(on.goes_on("a")))["step"] == 40
    await settle()
    assert first.result() == STOP
    assert not second.done()  # the word was on 20
    await on.desk.leave("a", "pruned")
    assert await on.soon(second) == STOP


@stage_test
async def test_a_paused_trial_goes_on_elsewhere_or_ends_once(on: Stage) -> None:
    for trial in ("a", "b"):
        told = on.begin(trial)
        (order,) = await on.cell(trial)
        await on.soon(order)
        word = on.decides(trial, trial, 20)
        await on.soon(told)
        await on.desk.leave(trial, "")
        assert await on.soon(word) == STOP
        await on.desk.over(trial, trial, "", {})
    assert await on.outcomes() == {}
    told = on.begin("a", resume=("trials/a", 20), spent_s=2.0)
    task = await on.soon(on.takes("b"))
    assert (task.order.trial, task.order.decided, task.order.spent_s) == ("a", 20, 2.0)
    await on.desk.leave("b", "pruned")
    await on.desk.leave("b", "pruned")
    (ended,) = await on.events("ended")
    assert (ended["trial"], ended["outcome"], ended["step"], ended["device_s"]) == ("b", "pruned", 20, 2.0)
    await on.desk.over("b", "a", "finished", {"step": 60, "device_s": 6.0})
    assert (await on.soon(told))["outcome"] == "finished"


@stage_test
async def test_a_trial_whose_place_in_tune_is_lost_ends_and_frees_its_cell(on: Stage) -> None:
    told = on.begin("a")
    await on.cell("x")
    word = on.decides("x", "a", 20)
    await on.soon(told)
    await on.desk.leave("a", "failed")
    assert await on.soon(word) == STOP
    (ended,) = await on.events("ended")
    assert ended["outcome"] == "failed"
    assert "Ray Tune" in ended["error"]


@stage_test
async def test_a_worker_that_kills_its_cell_each_time_fails_and_says_so(on: Stage) -> None:
    told = on.begin("a")
    await on.cell("x")
    for _ in range(MAX_LOSSES):
        assert not told.done()
        await on.joins("x")
        await settle()
        taken = on.takes("x")
        await settle()
        await on.desk.beat("x", "a", 7, 0.7)
        await on.desk.beat("x", "another", 900, 90.0)  # late
    message = await on.soon(told)
    assert message["outcome"] == "failed"
    assert f"{MAX_LOSSES} times" in message["error"]
    assert (message["step"], message["device_s"]) == (7, 0.7), "it has spent that, with no evaluation"
    assert not taken.done()
    assert await on.outcomes() == {"a": ["failed"]}


@stage_test
async def test_an_end_is_told_after_what_was_told_before(on: Stage) -> None:
    told = on.begin("a")
    await on.cell("x")
    on.decides("x", "a", 20)
    await on.soon(told)
    for step in (40, 45):
        await on.joins("x")
        await settle()
        await on.soon(on.takes("x"))
        on.decides("x", "a", step)
        await settle()
    await on.desk.over("x", "a", "diverged", {"error": "the loss is nan"})
    found = [await on.soon(on.goes_on("a")) for _ in range(3)]
    assert [(message["step"], message["outcome"]) for message in found] == [(40, ""), (45, ""), (45, "diverged")]


@stage_test
async def test_a_trial_that_ends_before_it_is_paused_is_not_run_again(on: Stage) -> None:
    told = on.begin("a")
    await on.cell("x")
    on.decides("x", "a", 20)
    await on.soon(told)
    await on.joins("x")
    await settle()
    await on.soon(on.takes("x"))
    await on.desk.over("x", "a", "finished", {"step": 60, "device_s": 6.0})
    await on.desk.leave("a", "")
    assert (await on.soon(on.begin("a", resume=("trials/a", 20))))["outcome"] == "finished"
    assert await on.outcomes() == {"a": ["finished"]}


@stage_test
async def test_a_word_that_comes_after_the_end_ends_nothing_again(on: Stage) -> None:
    told = on.begin("a")
    await on.cell("x")
    on.decides("x", "a", 20)
    await on.soon(told)
    for _ in range(MAX_LOSSES):
        await on.joins("x")
        await settle()
        on.takes("x")
        await settle()
    await on.desk.leave("a", "pruned")
    assert await on.outcomes() == {"a": ["failed"]}


@stage_test
async def test_an_evaluation_pardons_losses_and_a_drain_is_none(on: Stage) -> None:
    told = on.begin("a")
    await on.cell("x")
    for step in range(1, 2 * MAX_LOSSES):
        await on.desk.evaluated("x", "a", evaluation(step))
        await on.joins("x")
        await settle()
        on.takes("x")
        await settle()
    for number in range(2 * MAX_LOSSES):
        name = f"x{number - 1}" if number else "x"
        await on.desk.drain(name)
        await on.desk.lost(name, "a", "it was told to stop, and committed")
        assert await on.soon(on.takes(name)) is None
        await on.cell(f"x{number}")
        await settle()
    assert not told.done()


@stage_test
async def test_a_cell_that_drains_ends_once_all_its_workers_wait(on: Stage) -> None:
    on.begin("a")
    orders = await on.cell("x", 2)
    await on.soon(orders[1])
    await on.desk.drain("x")
    assert await on.soon(on.desk.look("x", "a", 1)) == STOP
    on.saved["a"] = 20
    await on.desk.lost("x", "a", "it was told to stop, and committed")
    first = on.takes("x", 0)
    await settle()
    assert not first.done()
    assert await on.soon(on.takes("x", 1)) is None
    assert await on.soon(first) is None
    (order,) = await on.cell("y")
    assert (await on.soon(order)).order.resume == ("trials/a", 20)
    idle = await on.cell("z")
    await on.desk.drain("z")
    assert await on.soon(idle[0]) is None


@stage_test
async def test_what_is_left_of_a_cell_that_was_dropped_gets_nothing(on: Stage) -> None:
    told = on.begin("a")
    await on.cell("x")
    await on.desk.drop("x", "its node is gone")
    await on.joins("x")  # its actor was killed; this worker was being started
    assert await on.soon(on.takes("x")) is None
    await settle()
    (order,) = await on.cell("y")
    assert (await on.soon(order)).order.trial == "a"
    assert await on.soon(on.desk.look("x", "a", 1)) == LEAVE
    assert not told.done()


@stage_test
async def test_one_worker_that_fails_ends_the_trial_with_its_error_and_breaks_the_group(on: Stage) -> None:
    told = on.begin("a")
    on.begin("b")
    await on.cell("x", 2)
    await on.desk.over("x", "a", "failed", {"error": "block 3 is damaged", "error_kind": "DataError"})
    await on.desk.lost("x", "a", "a member is gone")
    assert await on.soon(on.desk.look("x", "a", 1)) == LEAVE
    message = await on.soon(told)
    assert (message["outcome"], message["error"]) == ("failed", "block 3 is damaged")
    assert (await on.events("ended"))[0]["error_kind"] == "DataError"
    tasks = [on.takes("x", 0, held=1), on.takes("x", 1, held=None)]
    assert [(await on.soon(task)).generation for task in tasks] == [2, 2]


@stage_test
async def test_a_point_that_the_run_refuses_fails_and_nothing_waits(on: Stage) -> None:
    message = await on.soon(on.begin("a", arm="refused"))
    assert (message["outcome"], message["error"]) == ("failed", "lr is negative")
    assert (await on.events("ended"))[0]["error_kind"] == "SpecError"
    assert (await on.desk.view())["queued"] == 0


@stage_test
async def test_a_storage_that_does_not_say_where_to_go_on_ends_the_sweep_and_not_the_trial(on: Stage) -> None:
    def broken(_: str) -> int | None:
        raise StorageError("the bucket is gone")

    on.begin("a")
    await on.cell("x")
    on.newest = broken
    await on.joins("x")
    await settle()
    assert (await on.desk.view())["failure"] == ("StorageError", "the bucket is gone")
    assert await on.outcomes() == {}


@pytest.mark.parametrize("kind", ["StorageError", "SpecError"])
def test_what_every_other_trial_would_fail_of_ends_the_sweep_and_not_the_trial(tmp_path: Any, kind: str) -> None:
    async def run() -> None:
        on = Stage(str(tmp_path))
        told = on.begin("a")
        await on.cell("x", 2)
        await on.desk.over("x", "a", "hopeless", {"error": "the disk is full", "error_kind": kind, "step": 20})
        await on.desk.over("x", "a", "failed", {"error": "too late to count", "error_kind": "DataError"})
        assert await on.soon(on.desk.look("x", "a", 1)) == LEAVE, "the other worker is not to wait"
        assert (await on.desk.view())["failure"] == (kind, "a: the disk is full")
        await on.desk.finish()
        assert (await on.soon(told))["outcome"] == "interrupted"
        assert await on.outcomes() == {}, "it goes on with the sweep"

    asyncio.run(run())


@stage_test
async def test_finish_lets_all_commit_and_sends_everybody_home(on: Stage) -> None:
    running, deciding, queued = on.begin("a"), on.begin("b"), on.begin("c")
    for name in ("x", "y"):
        await on.cell(name)
    word = on.decides("y", "b", 20)
    await on.soon(deciding)
    reading = on.goes_on("a") if running.done() else running
    await on.desk.finish()
    assert await on.soon(word) == GO_ON  # to the next boundary: it would stop here without a commit
    assert await on.soon(on.desk.look("x", "a", 1)) == STOP
    assert await on.soon(on.decides("x", "a", 20)) == GO_ON
    assert [(await on.soon(told))["outcome"] for told in (reading, queued)] == ["interrupted"] * 2
    await on.desk.lost("x", "a", "it was told to stop, and committed")
    assert await on.soon(on.takes("x")) is None
    assert await on.outcomes() == {}
    assert (await on.soon(on.begin("d")))["outcome"] == "interrupted"


@stage_test
async def test_what_was_noted_is_in_storage_after_the_end(on: Stage) -> None:
    await on.desk.event("trial", {"trial": "a"})
    await on.desk.open()
    await on.desk.close("done", {"budget": 3})
    kinds = [(event["kind"], event.get("outcome")) for event in read_ledger(on.desk._hold.folder)]
    assert kinds == [("trial", None), ("end", "done")]


def test_a_ledger_that_cannot_be_written_is_the_drivers_to_know(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk_module, "FLUSH_S", 0.0)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    async def run() -> None:
        on = Stage(str(tmp_path))
        monkeypatch.setattr(os, "fsync", full)  # as late as a disk may say so
        await on.desk.event("trial", {"trial": "a"})
        await on.desk.open()
        while (failure := (await on.desk.view())["failure"]) is None:
            await asyncio.sleep(0.001)
        assert failure[0] == "StorageError"
        assert "the disk is full" in failure[1]

    asyncio.run(run())


def test_the_desk_of_a_killed_driver_notes_nothing_once_the_sweep_goes_on_elsewhere(tmp_path: Path) -> None:
    """It lives on for seconds, and the trial that it saw end is run by its successor, who has not read of that."""

    async def play(hold: Hold) -> None:
        on = Stage(str(tmp_path), hold)
        told = on.begin("a")
        await on.soon((await on.cell("x"))[0])
        await on.desk.settled()
        (tmp_path / ".lock").write_text(json.dumps({"token": "another", "pid": 7, "user": "who", "host": "came"}))
        await on.desk.over("x", "a", "finished", {"step": 60, "device_s": 6.5})
        await on.soon(told)
        with pytest.raises(ConflictError, match="was taken over by process 7 of who on came"):
            await on.desk.settled()

    with locked(str(tmp_path), remedy="") as hold:
        asyncio.run(play(hold))
    assert "ended" not in [event["kind"] for event in read_ledger(str(tmp_path))]
