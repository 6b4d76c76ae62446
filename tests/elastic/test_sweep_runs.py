"""Sweeps in real cells: what they come to, and that neither warm processes nor kills, crashes and stops change it."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import elastrain
from elastrain import storage
from elastrain.errors import ConflictError, ResourceError, SpecError, StorageError
from elastrain.lock import locked
from elastrain.observe.actions import read_actions
from elastrain.observe.ledger import read_ledger
from elastrain.spec.document import read_train
from elastrain.sweeps.document import read_sweep
from elastrain.training import checkpoint
from elastrain.training.state import digest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
SWEEP = """
kind: sweep
name: {name}
base: {base}
set: {{workers: {{min: 1, max: 1, cpus: 4}}, data.slots: 2, precision: fp32}}
objective: {{metric: val_loss, every: 20, max_steps: 60}}
space: {{optimizer.lr: {{log: [1.0e-4, 1.0e-1]}}}}
budget: {{unit: trials, per_arm: 4}}
"""

TASK = """

import os
import time
from pathlib import Path


class Moody(DigitsMLP):
    def __init__(self, data, mood="fine", pause=0.0, **args):
        super().__init__(data, **args)
        self.mood, self.pause, self.calls = mood, pause, 0

    def losses(self, model, batch):
        self.calls += model.training
        if not Path(__file__).with_name("fast").exists():
            time.sleep(self.pause)
        if self.mood == "raises" and self.calls > 10:
            raise KeyError("what is missing")
        if self.mood == "dies" and self.calls > 10:
            os._exit(9)
        found = super().losses(model, batch)
        if self.mood == "diverges" and self.calls > 70:
            found["loss"] = type(found["loss"])(found["loss"].sum * float("nan"), found["loss"].weight)
        return found
"""


@pytest.fixture
def sweep_of(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Write the spec of a small sweep over the digits and read it with changes, as somebody in the workspace would."""
    monkeypatch.chdir(workspace)
    base = tmp_path / "train.yaml"
    text = (ROOT / "pipelines" / "digits_mlp" / "train.yaml").read_text()
    base.write_text(text.replace("task.py:DigitsMLP", "moody.py:Moody"))
    (tmp_path / "moody.py").write_text((ROOT / "pipelines" / "digits_mlp" / "task.py").read_text() + TASK)

    def read(name: str, *changes: str) -> Any:
        path = tmp_path / f"{name}.yaml"
        path.write_text(SWEEP.format(name=name, base=base))
        return read_sweep(path, changes)

    return read


def ends(sweep: elastrain.Sweep) -> dict[str, str]:
    return {trial.id: trial.outcome for trial in sweep.trials()}


def digests(url: str) -> dict[str, str]:
    return {e["trial"]: e["weights_sha256"] for e in read_ledger(url) if e["kind"] == "ended" and "weights_sha256" in e}


def wait_for(what: Callable[[], object], *, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


@pytest.mark.usefixtures("local_ray")
def test_a_search_stops_bad_trials_confirms_the_best_and_says_what_trains_it_again(
    sweep_of: Callable[..., Any], workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = sweep_of(
        "search", "early_stop={method: asha, grace: 20, factor: 2}", "confirm={seeds: 2}", "budget.per_arm=6"
    )
    done = elastrain.sweep(spec)
    trials = done.trials()
    assert [t.phase for t in trials] == ["tune"] * 6 + ["confirm"] * 2
    assert {t.outcome for t in trials} == {"finished", "pruned"}
    assert all(len(t.evaluations) == t.step // 20 for t in trials)
    assert all(t.step < 60 for t in trials if t.outcome == "pruned")
    assert {t.seed for t in trials if t.phase == "confirm"}.isdisjoint({t.seed for t in trials if t.phase == "tune"})
    names = ("leaderboard.md", "leaderboard.csv", "leaderboard.json", "trials.parquet", "trials.jsonl", "report.html")
    assert all((workspace / "runs" / "search" / name).stat().st_size for name in names)
    assert done.table().num_rows == 8
    best = done.result["best_trial"]
    kept = {t.id for t in trials if t.id.startswith(best)}  # it, and what confirms it
    assert {path.parent.name for path in (workspace / "runs" / "search" / "trials").glob("*/checkpoints")} == kept
    # the same from another folder, in fresh processes: warm ones change nothing
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    again = elastrain.train(read_train(done.best))
    assert again.metrics["val_loss"] == done.result["best_value"]
    assert again.weights_sha256 == digests(done.url)[done.result["best_trial"]]
    # what is there is all there is to do
    before = (workspace / "runs" / "search" / "leaderboard.json").read_bytes()
    monkeypatch.chdir(workspace)
    assert elastrain.sweep(spec).result["best_value"] == done.result["best_value"]
    assert (workspace / "runs" / "search" / "leaderboard.json").read_bytes() == before


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("bands", ("early_stop={method: hyperband, grace: 20, factor: 2}", "budget.per_arm=4")),
        ("median", ("early_stop={method: median, grace: 20}", "search.method=tpe", "budget.per_arm=12")),
    ],
)
def test_hyperband_median_and_tpe_come_to_their_end_in_cells(
    sweep_of: Callable[..., Any], name: str, changes: tuple[str, ...]
) -> None:
    spec = sweep_of(name, *changes)
    done = elastrain.sweep(spec)
    trials = done.trials()
    assert len(trials) == spec.budget.per_arm
    assert {t.outcome for t in trials} == {"finished", "pruned"}
    for t in trials:
        assert [e.step for e in t.evaluations] == list(range(20, t.step + 1, 20))  # paused or not, each once
    told = [(e["trial"], e["step"]) for e in read_ledger(done.url) if e["kind"] == "eval"]
    assert len(told) == len(set(told))
    ended = [e["trial"] for e in read_ledger(done.url) if e["kind"] == "ended"]
    assert sorted(ended) == sorted(t.id for t in trials)


@pytest.mark.usefixtures("local_ray")
def test_two_workers_a_trial_one_of_them_killed_and_the_bits_of_fresh_processes(
    sweep_of: Callable[..., Any], workspace: Path
) -> None:
    fixed = ("set.workers={min: 2, max: 2, cpus: 4}", "set.consistency=bitwise", "set.checkpoint.every_steps=20")
    spec = sweep_of("pair", *fixed, "budget.per_arm=2", "set.task_args={pause: 0.05}")
    url = workspace / "runs" / "pair"
    killed: list[int] = []

    def kill() -> None:
        wait_for((url / "trials" / "search-0000" / "checkpoints" / "step-00000020" / "manifest.json").exists)
        killed.append(workers_of(os.getpid())[0])
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    done = elastrain.sweep(spec)
    thread.join()
    assert killed
    assert set(ends(done).values()) == {"finished"}
    lost = [event for event in read_ledger(done.url) if event["kind"] == "lost"]
    assert [event["trial"] for event in lost] == ["search-0000"]
    for number in (0, 1):
        point = done.trials()[number].point
        changes = [f"optimizer.lr={point['optimizer.lr']!r}", f"name=pair-again-{number}"]
        again = elastrain.train(read_train(done.best, changes))
        assert again.weights_sha256 == digests(done.url)[f"search-000{number}"]


def workers_of(pid: int) -> list[int]:
    """Return the processes below `pid` that are Ray Train's workers."""
    from elastrain.elastic.keep import descendants

    def title(process: int) -> str:
        try:
            return Path(f"/proc/{process}/cmdline").read_text()
        except OSError:
            return ""

    return [process for process in descendants(pid) if "RayTrainWorker" in title(process)]


ARMS = """[
    {name: sound, optimizer: {name: adamw, lr: 0.003}, space: {task_args.mood: {grid: [fine]}}},
    {name: broken, optimizer: {name: sgd, lr: 0.1}, space: {task_args.mood: {grid: [raises, dies]}}},
    {name: hot, optimizer: {name: sgd, lr: 0.1}, space: {task_args.mood: {grid: [diverges]}}},
]"""


@pytest.mark.usefixtures("local_ray")
def test_trials_and_whole_arms_that_crash_die_and_diverge_cost_themselves(sweep_of: Callable[..., Any]) -> None:
    few = ("search.method=grid", "budget.per_arm=2", "confirm.seeds=1")
    done = elastrain.sweep(sweep_of("moods", "space={}", "mode=fair", f"arms={ARMS}", *few))
    found = done.trials()
    assert [(trial.arm, trial.phase) for trial in found if trial.phase == "confirm"] == [("sound", "confirm")]
    assert {(trial.arm, trial.outcome) for trial in found} == {
        ("sound", "finished"),
        ("broken", "failed"),
        ("hot", "diverged"),
    }
    trials = {trial.point["task_args.mood"]: trial for trial in found if trial.phase == "tune"}
    assert "KeyError: 'what is missing'" in trials["raises"].error
    assert "3 times" in trials["dies"].error
    # two slots a step: the loss of step 35 is not finite, and no step is done after it
    assert trials["diverges"].error.startswith("step 35: the loss is nan")
    # what came after the last evaluation has been spent, too
    assert (trials["diverges"].step, trials["raises"].step) == (35, 5)
    assert trials["diverges"].device_s > trials["diverges"].evaluations[-1].device_s
    assert trials["raises"].device_s > 0.0
    assert done.result["best_trial"] == "sound-0000"
    assert {row["arm"] for row in done.result["leaderboard"]["rows"]} == {"sound", "broken", "hot"}


@pytest.mark.usefixtures("local_ray")
def test_what_takes_over_in_population_based_training_has_its_donors_weights(sweep_of: Callable[..., Any]) -> None:
    """Two workers a trial: both follow what rank 0 was told."""
    changes = ("search.method=pbt", "set.workers={min: 2, max: 2, cpus: 2}")
    done = elastrain.sweep(sweep_of("population", *changes, "space={optimizer.lr: {log: [1.0e-4, 3.0e-2]}}"))
    assert set(ends(done).values()) == {"finished"}
    taken = [event for event in read_ledger(done.url) if event["kind"] == "exploit"]
    assert taken
    for event in taken:
        saved = checkpoint.load(f"{done.url}/trials/{event['donor']}", event["step"])
        weights = {n.removeprefix("model/"): t for n, t in saved.tensors.items() if n.startswith("model/")}
        assert event["weights_sha256"] == digest(weights)
        assert event["trial"] != event["donor"]
        assert event["point"] != next(t for t in done.trials() if t.id == event["donor"]).point


def leaderboard(url: str) -> list[tuple[Any, ...]]:
    found = storage.read_json(f"{url}/leaderboard.json")
    return [(row["rank"], row["trial"], row["value"]) for row in found["rows"]]


def test_a_killed_and_an_interrupted_driver_go_on_to_the_same_leaderboard(
    sweep_of: Callable[..., Any], tmp_path: Path, workspace: Path, cli: Any, start: Any, s3_bucket: str
) -> None:
    """And to that of a sweep on S3, whose trials read through a cache."""
    packed = workspace / "data" / "digits"
    for file in (path for path in packed.rglob("*") if path.is_file()):
        storage.put(f"{s3_bucket}/{file.relative_to(packed)}", file.read_bytes())
    data = {"train": f"{s3_bucket}/train", "eval": f"{s3_bucket}/test", "slots": 2}
    data["cache"] = {"folder": str(tmp_path / "cache"), "max_bytes": 1 << 30}
    far = ("--set", f"storage={s3_bucket}/sweeps", "--set", f"set.data={json.dumps(data)}")
    sweep_of("straight")
    slow = ("set.task_args={pause: 0.02}", "set.workers={min: 1, max: 1}", "set.checkpoint.every_steps=20")
    # One trial at a time: which one ASHA stops depends on who came first.
    stops = ("early_stop={method: asha, grace: 20, factor: 2}", "confirm={seeds: 2}", "max_concurrent=1")
    changes, path = [part for each in (*slow, *stops) for part in ("--set", each)], str(tmp_path / "straight.yaml")
    straight = cli("sweep", path, *changes, *far, "--json")
    assert straight.returncode == 0, straight.stderr
    assert any((tmp_path / "cache").rglob("*")), "read through it"

    url = workspace / "runs" / "crooked"
    crooked = ("sweep", path, *changes, "--set", "name=crooked", "--json")

    def evaluated(count: int) -> bool:
        return url.exists() and sum(e["kind"] == "eval" for e in read_ledger(str(url))) >= count

    for number, (count, how, code) in enumerate(((2, signal.SIGKILL, -9), (6, signal.SIGINT, 130))):
        process = start(*crooked)
        wait_for(partial(evaluated, count), seconds=240)
        process.send_signal(how)
        assert process.wait(timeout=120) == code, (number, process.communicate())
    done = cli(*crooked)
    assert done.returncode == 0, done.stderr
    assert leaderboard(str(url)) == leaderboard(f"{s3_bucket}/sweeps/straight")
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["trials"] == json.loads(straight.stdout.splitlines()[-1])["trials"]
    assert set(result["trials"]) == {"finished", "pruned"}
    ended = [event["trial"] for event in read_ledger(str(url)) if event["kind"] == "ended"]
    assert sorted(ended) == sorted(set(ended)), "no trial is run to its end twice"
    noted = [each["action"] for each in read_actions(str(workspace / "runs")) if each["run"] == str(url)]
    assert noted == ["start", "resume", "stop", "resume"]


def test_what_can_be_refused_is_refused_before_anything_starts(sweep_of: Callable[..., Any], workspace: Path) -> None:
    spec = sweep_of("refused")
    with locked(str(workspace / "runs" / "refused"), remedy="wait"), pytest.raises(ConflictError, match="another name"):
        elastrain.sweep(spec)
    with pytest.raises(ResourceError, match="no node"):
        elastrain.sweep(sweep_of("huge", "set.workers={min: 1, max: 1, gpus: 1}"))


@pytest.mark.usefixtures("local_ray")
def test_a_metric_that_is_never_reported_ends_the_sweep_at_its_first_evaluation(
    sweep_of: Callable[..., Any], workspace: Path
) -> None:
    with pytest.raises(ResourceError, match="a trial of 1 workers of 9 CPUs each fits on no node"):
        elastrain.sweep(sweep_of("wide", "set.workers={min: 1, max: 1, cpus: 9}"))
    sentence = "objective.metric: the metrics are val_loss, accuracy, not 'perplexity'"
    with pytest.raises(SpecError, match=sentence):
        elastrain.sweep(sweep_of("unheard", "objective.metric=perplexity", "budget.per_arm=64"))
    kinds = [event["kind"] for event in read_ledger(str(workspace / "runs" / "unheard"))]
    assert kinds.count("trial") <= 4, "not one after the other"
    assert "ended" not in kinds


@pytest.mark.usefixtures("local_ray")
def test_another_sweep_in_the_same_folder_is_refused_and_more_budget_is_not(
    sweep_of: Callable[..., Any], workspace: Path
) -> None:
    """Nor does it cost a trial that a checkpoint of it could not be written."""
    (first,) = elastrain.sweep(sweep_of("grown", "budget.per_arm=1")).trials()
    with pytest.raises(ConflictError, match="space"):
        elastrain.sweep(sweep_of("grown", "space={optimizer.lr: {log: [1.0e-4, 1.0]}}"))
    in_the_way = workspace / "runs" / "grown" / "trials" / "search-0001"
    in_the_way.write_text("no folder")
    with pytest.raises(StorageError, match=f"search-0001: cannot write {in_the_way}"):
        elastrain.sweep(sweep_of("grown", "budget.per_arm=2"))
    in_the_way.unlink()
    again, second = elastrain.sweep(sweep_of("grown", "budget.per_arm=2")).trials()
    assert again == first
    assert second.outcome == "finished"
    target = elastrain.sweep(sweep_of("grown", "budget.per_arm=2", "objective.target=0.01"))
    assert target.trials() == [again, second]
    assert "No trial reached the target" in target.as_text()
