"""The loop: what it asks for, hands over and reports, and when it ends."""

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from tests.training.harness import (
    Adversarial,
    Classifier,
    MemoryFeed,
    Recorder,
    Seat,
    Setup,
    lockstep,
    losses_of,
    make_arrays,
    make_dataset,
    make_spec,
    train_alone,
    train_together,
)
from torch import nn

from elastrain.errors import DataError, SpecError
from elastrain.observe.ledger import CATEGORIES
from elastrain.spec.accelerators import FAKE_GPUS
from elastrain.spec.train import DataSpec
from elastrain.training import loop as loop_module
from elastrain.training.loop import Loop, choose_device, fix_threads
from elastrain.training.manifests import read_manifests
from elastrain.training.reduce import Group, GroupLost, Solo
from elastrain.training.state import TrainState, digest
from elastrain.training.task import Batch, DataInfo, Loss, Losses, Task, make_task


def recorder_of(loop: Loop) -> Recorder:
    """What the loop told."""
    assert isinstance(loop.recorder, Recorder)
    return loop.recorder


def feed_of(loop: Loop) -> MemoryFeed:
    """Whom the loop asked."""
    assert isinstance(loop.feed, MemoryFeed)
    return loop.feed


@pytest.mark.parametrize("size", [1, 3])
def test_the_audit_has_every_sample_once_and_before_its_step_counts(size: int) -> None:
    setup = Setup(spec=make_spec(audit=True, **{"budget.steps": 10, "data.slots": 5}), kind=Classifier)
    loops = train_together(setup, size)
    audits = [audit for loop in loops for audit in recorder_of(loop).audits]
    assert all(set(columns["step"]) == {step} and set(columns["slot"]) == {slot} for step, slot, columns in audits)
    lines = np.concatenate([np.stack([columns["epoch"], columns["row"]], 1) for _, _, columns in audits])
    assert sorted(map(tuple, lines.tolist())) == [(epoch, row) for epoch in range(2) for row in range(100)]
    for loop in loops:
        log = [entry for entry in recorder_of(loop).log if "audit" in entry]
        assert log.count("audited") == 10
        assert log[-1] == "audited", "after the sum a worker may be dead"


def test_without_an_audit_nothing_is_handed_over_and_nothing_else_changes() -> None:
    plain, audited = (train_alone(Setup(spec=make_spec(audit=on), kind=Classifier))[0] for on in (False, True))
    assert "audit" not in " ".join(recorder_of(plain).log)
    assert "audited" in recorder_of(audited).log
    assert digest(plain.state.tensors()) == digest(audited.state.tensors())


def test_blocks_are_taken_once_and_released_when_all_are_past_them() -> None:
    setup = Setup(spec=make_spec(**{"budget.steps": 10}), kind=Classifier, block_steps=3)
    loops = train_together(setup, 2)
    assert [sorted(feed_of(loop).taken) for loop in loops] == [
        [(slot, block) for slot in slots for block in range(4)] for slots in ((0, 1), (2, 3))
    ]
    assert feed_of(loops[0]).released == [0, 1, 2, 3]
    assert feed_of(loops[1]).released == []


def test_each_step_has_a_line() -> None:
    spec = make_spec(clip_norm=1.0, schedule={"name": "linear"}, optimizer={"name": "sgd", "lr": 0.5})
    loop, result = train_alone(Setup(spec=spec, kind=Classifier))
    lines = recorder_of(loop).lines
    assert [line[:3] for line in lines] == [(k, k // 5, 4.0 if k % 5 == 4 else 24.0) for k in range(8)]
    assert [line[4] for line in lines] == [0.5 * (1 - k / 8) for k in range(8)]
    assert all(line[5] > 0 for line in lines)
    assert (result["step"], result["samples"], result["stopped"]) == (8, 7 * 24 + 4, False)
    plain = train_alone(Setup(spec=make_spec(), kind=Classifier))[0]
    assert all(math.isnan(line[5]) for line in recorder_of(plain).lines)


def test_a_loss_of_phases_is_their_sum() -> None:
    seen: dict[str, list[float]] = {"discriminator": [], "generator": []}

    class Watched(Adversarial):
        def _judged(self, model: nn.Module, batch: Batch) -> Loss:
            return self._noted("discriminator", super()._judged(model, batch))

        def _made(self, model: nn.Module, batch: Batch) -> Loss:
            return self._noted("generator", super()._made(model, batch))

        def _noted(self, phase: str, loss: Loss) -> Loss:
            seen[phase].append(float(loss.sum.detach()) / float(loss.weight))
            return loss

    spec = make_spec(precision="fp64", **{"data.slots": 1, "workers.max": 1})
    losses = losses_of(train_alone(Setup(spec=spec, kind=Watched))[0])
    assert np.allclose(losses, np.sum(list(seen.values()), axis=0), rtol=1e-10)


@pytest.mark.parametrize("size", [1, 3])
def test_a_wish_stops_all_workers_at_the_same_step(size: int, tmp_path: Path) -> None:
    setup = Setup(spec=make_spec(), kind=Classifier, run_url=str(tmp_path))

    def work(group: Group) -> dict[str, Any]:
        stop_at = {0: 3, 1: 0, 2: None}[group.rank]  # what rank 0 knows counts
        return setup.loop(Seat(lambda _: group, stop_at=stop_at)).run()

    for result in lockstep(size, work):
        assert (result["step"], result["stopped"]) == (4, True)
    manifests = read_manifests(str(tmp_path))
    assert list(manifests) == [4]
    assert manifests[4]["info"]["complete"] is False


def test_a_wish_in_the_last_step_is_no_stop(tmp_path: Path) -> None:
    _, result = train_alone(Setup(spec=make_spec(), kind=Classifier, run_url=str(tmp_path)), stop_at=7)
    assert (result["step"], result["stopped"]) == (8, False)


def test_evaluation_is_due_by_the_spec_and_at_the_end(tmp_path: Path) -> None:
    setup = Setup(spec=make_spec(**{"eval.every_steps": 3}), kind=Classifier, eval_rows=20, run_url=str(tmp_path))
    loop, result = train_alone(setup)
    events = [fields for kind, fields in recorder_of(loop).events if kind == "eval"]
    assert [fields["step"] for fields in events] == [3, 6, 8]
    assert result["metrics"] == events[-1]["metrics"]
    again = setup.loop(Seat(lambda _: Solo()), loop.state).run()  # a run that had ended
    assert {**again, "stopped": False} == result


class Overtaken(Seat):
    """The group fails in the evaluation after the last step, here; another member has come out of it, and shares."""

    def __init__(self, last: int) -> None:
        super().__init__(lambda _: Solo(1))
        self._last, self._failed = last, False

    def group(self, state: TrainState) -> Group:
        """The first group, or the one after it."""
        if self._failed:
            state.due, state.evaluated = False, state.step
            return Solo(2)
        group: Any = super().group(state)
        if state.step == self._last and not self._failed:
            group.all_reduce = self._fails
        return cast("Group", group)

    def _fails(self, _: torch.Tensor) -> None:
        raise GroupLost("a member is gone")

    def lost(self) -> None:
        """Take note."""
        self._failed = True


def test_who_leads_commits_also_where_another_was_first_past_the_boundary(tmp_path: Path) -> None:
    spec = make_spec(**{"budget.steps": 3, "eval.every_steps": 3, "checkpoint.every_steps": 3})
    setup = Setup(spec=spec, kind=Classifier, eval_rows=20, run_url=str(tmp_path))
    found = setup.loop(Overtaken(3)).run()
    assert read_manifests(str(tmp_path))[3]["info"]["weights_sha256"] == found["weights_sha256"]


def test_commits_are_told(tmp_path: Path) -> None:
    spec = make_spec(checkpoint={"every_steps": 3, "keep": 9})
    loop, _ = train_alone(Setup(spec=spec, kind=Classifier, run_url=str(tmp_path)))
    told = [fields for kind, fields in recorder_of(loop).events if kind == "checkpoint"]
    assert [fields["step"] for fields in told] == [3, 6, 8] == list(read_manifests(str(tmp_path)))
    settled = [int(entry.removeprefix("settled ")) for entry in recorder_of(loop).log if "settled" in entry]
    assert all(lines >= step for lines, step in zip(settled, (3, 6, 8), strict=True)), "each has the lines of its steps"
    assert all(fields["bytes"] > 1000 and fields["write_s"] > 0 for fields in told)


def test_on_a_gpu_losses_are_read_at_the_same_steps_by_newcomers(monkeypatch: pytest.MonkeyPatch) -> None:
    """All workers have to see a wish to stop at the same step, however many steps each of them has behind it."""
    monkeypatch.setattr(loop_module, "CUDA_READ_STEPS", 4)
    setup = Setup(spec=make_spec(**{"budget.steps": 20}), kind=Classifier)

    def reads(start: int) -> list[int]:
        loop = setup.loop(Seat(lambda _: Solo()))
        loop.state.device = torch.device("cuda")  # only looked at
        found = []
        for step in range(start, 12):
            loop.state.step = step + 1
            loop._pending.append((step, None))  # type: ignore[arg-type]
            monkeypatch.setattr(type(loop), "plan", loop.plan, raising=False)
            try:
                loop._read(force=False)
            except AttributeError:  # it looked at the result, which is none here
                found.append(step + 1)
                loop._pending.clear()
        return found

    assert reads(0) == [4, 8, 12]
    assert reads(6) == [8, 12]


def test_time_is_booked_under_what_it_was_spent_on() -> None:
    loop, _ = train_alone(Setup(spec=make_spec(), kind=Classifier, eval_rows=20))
    spent = loop.clock.spent()
    assert set(spent) == set(CATEGORIES)
    assert all(spent[category] > 0 for category in ("start", "compute", "reduce", "data", "evaluate", "checkpoint"))


def test_devices_and_threads_follow_the_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device(0) == torch.device("cpu")
    assert choose_device(0.5) == torch.device("cuda", 0)
    monkeypatch.setenv(FAKE_GPUS, "1")  # as on nodes of `cluster local`
    assert choose_device(1) == torch.device("cpu")
    fix_threads(0.5)
    assert torch.get_num_threads() == 1


# --- tasks that are wrong


def made(name: str, **args: Any) -> Task:
    """The task of a spec."""
    return make_task(make_spec(task=name, task_args=args), make_dataset(make_arrays(20)))


class Picky(Classifier):
    """Takes one argument."""

    def __init__(self, data: DataInfo, *, size: int) -> None:
        super().__init__(data, size=size)


class Twice(Classifier):
    """Has a phase twice."""

    phases = ("a", "a")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tests.training.harness:Nothing", "has no 'Nothing'"),
        ("tests.training.nowhere:Task", "cannot import"),
        ("tests.training.harness:make_spec", "not a class derived from elastrain.Task"),
        ("tests.training.test_loop:Picky", "missing 1 required keyword-only argument: 'size'"),
        ("tests.training.test_loop:Twice", "phases must be different names"),
        ("nowhere.py:Task", "no file nowhere.py"),
    ],
)
def test_a_task_that_cannot_be_made_is_named(name: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        made(name)


def test_a_task_knows_its_data() -> None:
    task = made("tests.training.harness:Classifier", dropout=0.1)
    assert task.args == {"dropout": 0.1}
    assert (task.data.num_rows, task.data.shape("image"), task.data.num_values("label")) == (20, (6, 6), 3)
    with pytest.raises(DataError, match="asks for column 'y', which the data lack; the columns are x, image"):
        task.data.shape("y")
    with pytest.raises(DataError, match="'x': the number of its values is unknown"):
        task.data.num_values("x")


def wrong(losses: Any) -> type[Task]:
    """A task with these losses."""

    class Wrong(Classifier):
        def losses(self, model: nn.Module, batch: Batch) -> Losses:
            found: Losses = losses(model, batch)
            return found

    return Wrong


@pytest.mark.parametrize(
    ("losses", "error", "words"),
    [
        (lambda *_: {"other": Loss(torch.zeros(()), 1)}, SpecError, r"losses\(\) gave \['other'\]"),
        (lambda *_: {"loss": torch.zeros(())}, SpecError, r"must be a Loss\(sum, weight\)"),
        (lambda *_: {"loss": Loss(torch.zeros(3), 1)}, SpecError, "whose sum is a scalar"),
        (lambda _, batch: batch["y"], DataError, "asks for column 'y'"),
        (lambda model, _: model(torch.zeros(2, 5)), SpecError, "raised RuntimeError"),
    ],
)
def test_losses_that_are_wrong_are_named(losses: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        train_alone(Setup(spec=make_spec(), kind=wrong(losses)))


def test_a_model_without_parameters_is_refused() -> None:
    class Empty(Classifier):
        def build(self) -> nn.Module:
            return nn.Identity()

    with pytest.raises(SpecError, match="no parameters that need a gradient"):
        Setup(spec=make_spec(), kind=Empty).state()


def test_slots_are_those_of_the_spec() -> None:
    assert DataSpec(train="x", global_batch=8).slots is None
    assert make_spec(**{"data.slots": None, "workers.max": 3}).num_slots == 3
