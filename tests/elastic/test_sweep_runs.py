"""Sweeps in real cells: what they come to, and that neither warm processes nor kills, crashes and stops change it.

A sweep has one cell unless it says otherwise: each more is a process that imports torch.
"""

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.elastic.sweep_stage import Moods, wait_for

import elastrain
from elastrain import storage
from elastrain.elastic.keep import descendants
from elastrain.errors import ConflictError, Interrupted, ResourceError, SpecError, StorageError
from elastrain.lock import locked
from elastrain.observe.actions import read_actions
from elastrain.observe.ledger import read_ledger
from elastrain.spec.document import read_train
from elastrain.sweeps.trials import trials_of
from elastrain.training import checkpoint
from elastrain.training.state import digest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

ONE = "max_concurrent=1"
# One trial at a time: which one ASHA stops depends on who came first.
STOPS = ("early_stop={method: asha, grace: 20, factor: 2}", "confirm={seeds: 2}", ONE, "set.checkpoint.every_steps=20")


@pytest.fixture(scope="module")
def local_ray(s3_server: dict[str, str]) -> Iterator[None]:
    """One Ray for all sweeps of this module that are made from Python; its workers reach the S3 server."""
    from elastrain.elastic.session import ray_session

    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.items():
            patch.setenv(name, value)
        with ray_session("local", cpus=8):
            yield


@pytest.fixture(scope="module")
def moods(local_ray: None, workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Moods]:
    """The sweeps' files, read as somebody in the workspace would; and a Ray for them."""
    assert local_ray is None
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        yield Moods(tmp_path_factory.mktemp("moods"))


@pytest.fixture(scope="module")
def far(workspace: Path, s3_server: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Data and sweeps on S3, the data read through a cache."""
    bucket, packed = f"s3://{s3_server['BUCKET']}", workspace / "data" / "digits"
    for file in (path for path in packed.rglob("*") if path.is_file()):
        storage.put(f"{bucket}/{file.relative_to(packed)}", file.read_bytes())
    data = {"train": f"{bucket}/train", "eval": f"{bucket}/test", "slots": 2}
    cache = {"folder": str(tmp_path_factory.mktemp("cache")), "max_bytes": 1 << 30}
    return (f"storage={bucket}/sweeps", f"set.data={json.dumps({**data, 'cache': cache})}")


@pytest.fixture(scope="module")
def searched(moods: Moods, far: tuple[str, ...]) -> elastrain.Sweep:
    """A search on S3 that nothing disturbs: bad trials stop early, in one cell, and the best one is confirmed."""
    return elastrain.sweep(moods.read("search", *STOPS, *far))


@pytest.fixture(scope="module")
def again(searched: elastrain.Sweep, tmp_path_factory: pytest.TempPathFactory) -> elastrain.Run:
    """The best one of the search as a run in another folder, in processes of its own."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "best.yaml").write_bytes(storage.read_bytes(searched.best))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(elsewhere)
        return elastrain.train(read_train("best.yaml"))


def ends(sweep: elastrain.Sweep) -> dict[str, str]:
    return {trial.id: trial.outcome for trial in sweep.trials()}


def digests(url: str) -> dict[str, str]:
    return {e["trial"]: e["weights_sha256"] for e in read_ledger(url) if e["kind"] == "ended" and "weights_sha256" in e}


def test_a_search_stops_bad_trials_confirms_the_best_and_says_what_trains_it_again(
    searched: elastrain.Sweep, again: elastrain.Run, moods: Moods, far: tuple[str, ...]
) -> None:
    done, trials = searched, searched.trials()
    assert [t.phase for t in trials] == ["tune"] * 4 + ["confirm"] * 2
    assert {t.outcome for t in trials} == {"finished", "pruned"}
    assert all(len(t.evaluations) == t.step // 20 for t in trials)
    assert all(t.step < 60 for t in trials if t.outcome == "pruned")
    assert {t.seed for t in trials if t.phase == "confirm"}.isdisjoint({t.seed for t in trials if t.phase == "tune"})
    names = ("leaderboard.md", "leaderboard.csv", "leaderboard.json", "trials.parquet", "trials.jsonl", "report.html")
    sizes = {file.path: file.size_bytes for file in storage.list_files(done.url)}
    assert all(sizes[name] for name in names)
    assert done.table().num_rows == 6
    best = done.result["best_trial"]
    kept = {t.id for t in trials if t.id.startswith(best)}  # it, and what confirms it
    assert {path.split("/")[1] for path in sizes if "/checkpoints/" in path} == kept
    cache = Path(json.loads(far[1].removeprefix("set.data="))["cache"]["folder"])
    assert any(cache.rglob("*")), "read through it"
    # the same from another folder, in fresh processes: warm ones change nothing
    assert best != trials[0].id, "it came to processes that had run another one"
    assert again.metrics["val_loss"] == done.result["best_value"]
    assert again.weights_sha256 == digests(done.url)[best]
    # what is there is all there is to do
    before = storage.read_bytes(f"{done.url}/leaderboard.json")
    assert elastrain.sweep(moods.read("search", *STOPS, *far)).result["best_value"] == done.result["best_value"]
    assert storage.read_bytes(f"{done.url}/leaderboard.json") == before


def test_hyperband_comes_to_its_end_in_two_cells(moods: Moods) -> None:
    done = elastrain.sweep(moods.read("bands", "early_stop={method: hyperband, grace: 20, factor: 2}"))
    trials = done.trials()
    assert sorted(t.outcome for t in trials) == ["finished"] * 3 + ["pruned"]
    for t in trials:
        assert [e.step for e in t.evaluations] == list(range(20, t.step + 1, 20))  # paused or not, each once
    told = [(e["trial"], e["step"]) for e in read_ledger(done.url) if e["kind"] == "eval"]
    assert len(told) == len(set(told))
    ended = [e["trial"] for e in read_ledger(done.url) if e["kind"] == "ended"]
    assert sorted(ended) == sorted(t.id for t in trials)
    assert len({e["cell"] for e in read_ledger(done.url) if e["kind"] == "cell"}) == 2


def test_two_workers_a_trial_one_of_them_killed_and_the_bits_of_fresh_processes(
    searched: elastrain.Sweep, again: elastrain.Run, moods: Moods, workspace: Path
) -> None:
    """A point that one worker has trained in processes of its own, twice: with a kill, and in a cell that had one."""
    (best,) = (trial.point for trial in searched.trials() if trial.id == searched.result["best_trial"])
    twice = ("space={task_args.mood: {grid: [fine, calm]}}", "search.method=grid", "budget.per_arm=2")
    fixed = ("set.workers={min: 2, max: 2, cpus: 4, timeout_s: 600}", "set.checkpoint.every_steps=20")
    spec = moods.read("pair", *twice, *fixed, f"set.optimizer.lr={best['optimizer.lr']!r}")
    first = workspace / "runs" / "pair" / "trials" / "search-0000" / "checkpoints" / "step-00000040" / "manifest.json"

    def kill() -> None:
        try:
            moods.wait()
            wait_for(first.exists)
            os.kill(workers_of(os.getpid())[0], signal.SIGKILL)
        finally:
            moods.release()

    moods.hold()
    thread = threading.Thread(target=kill)
    thread.start()
    done = elastrain.sweep(spec)
    thread.join()
    assert set(ends(done).values()) == {"finished"}
    lost = [event for event in read_ledger(done.url) if event["kind"] == "lost"]
    assert [event["trial"] for event in lost] == ["search-0000"]
    assert set(digests(done.url).items()) == {(f"search-000{at}", again.weights_sha256) for at in (0, 1)}


def workers_of(pid: int) -> list[int]:
    """Return the processes below `pid` that are Ray Train's workers."""

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


def test_trials_and_whole_arms_that_crash_die_and_diverge_cost_themselves(moods: Moods) -> None:
    few = ("search.method=grid", "budget.per_arm=2", "confirm.seeds=1", ONE)
    done = elastrain.sweep(moods.read("moods", "space={}", "mode=fair", f"arms={ARMS}", *few))
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


def test_what_takes_over_in_population_based_training_has_its_donors_weights(moods: Moods) -> None:
    """Two workers a trial: both follow what rank 0 was told."""
    changes = ("search.method=pbt", "set.workers={min: 2, max: 2, cpus: 2}", ONE)
    done = elastrain.sweep(moods.read("population", *changes, "space={optimizer.lr: {log: [1.0e-4, 3.0e-2]}}"))
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
    searched: elastrain.Sweep, moods: Moods, workspace: Path, start: Any
) -> None:
    """On a local folder, to that of the search on S3, whose trials read through a cache."""
    spec, url = moods.read("crooked", *STOPS), workspace / "runs" / "crooked"
    moods.hold()
    process = start("sweep", str(moods.path("crooked")), *(part for each in STOPS for part in ("--set", each)))
    moods.wait()
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=300) == -9, process.communicate()

    def interrupt() -> None:
        try:
            moods.wait()
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            moods.release()

    moods.hold(3)
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupted):
        elastrain.sweep(spec)
    thread.join()
    stopped = trials_of(read_ledger(str(url)))
    assert 2 <= len(stopped) < 6, "neither at its beginning nor at its end"
    done = elastrain.sweep(spec)
    assert leaderboard(str(url)) == leaderboard(searched.url)
    assert done.result["trials"] == searched.result["trials"]
    assert set(done.result["trials"]) == {"finished", "pruned"}
    ended = [event["trial"] for event in read_ledger(str(url)) if event["kind"] == "ended"]
    assert sorted(ended) == sorted(set(ended)), "no trial is run to its end twice"
    noted = [each["action"] for each in read_actions(str(workspace / "runs")) if each["run"] == str(url)]
    assert noted == ["start", "resume", "stop", "resume"]


def test_what_can_be_refused_is_refused_before_anything_starts(moods: Moods, workspace: Path) -> None:
    spec = moods.read("refused")
    with locked(str(workspace / "runs" / "refused"), remedy="wait"), pytest.raises(ConflictError, match="another name"):
        elastrain.sweep(spec)
    with pytest.raises(ResourceError, match="no node"):
        elastrain.sweep(moods.read("huge", "set.workers={min: 1, max: 1, gpus: 1}"))
    with pytest.raises(ResourceError, match="a trial of 1 workers of 9 CPUs each fits on no node"):
        elastrain.sweep(moods.read("wide", "set.workers={min: 1, max: 1, cpus: 9}"))
    for name in ("huge", "wide"):
        assert not storage.list_files(str(workspace / "runs" / name)), "with other workers it is as good as new"


def test_a_metric_that_is_never_reported_ends_the_sweep_at_its_first_evaluation(moods: Moods, workspace: Path) -> None:
    sentence = "objective.metric: the metrics are val_loss, accuracy, not 'perplexity'"
    with pytest.raises(SpecError, match=sentence):
        elastrain.sweep(moods.read("unheard", "objective.metric=perplexity", "budget.per_arm=64", ONE))
    kinds = [event["kind"] for event in read_ledger(str(workspace / "runs" / "unheard"))]
    assert kinds.count("trial") <= 4, "not one after the other"
    assert "ended" not in kinds


def test_a_full_disk_ends_the_sweep_with_one_sentence_and_costs_no_trial_that_has_ended(
    moods: Moods, small_disk: Path
) -> None:
    """The second trial stands still while the disk fills up."""
    url = str(small_disk / "full")

    def fill() -> None:
        try:
            moods.wait()
            wait_for(lambda: any(event["kind"] == "ended" for event in read_ledger(url)))
            with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
                while True:
                    filler.write(b"x" * 1000)
        finally:
            moods.release()

    moods.hold(2)
    thread = threading.Thread(target=fill)
    thread.start()
    with pytest.raises(StorageError, match="the disk is full: free space or choose another storage") as ended:
        elastrain.sweep(moods.read("full", f"storage={small_disk}", "budget.per_arm=2", ONE))
    thread.join()
    assert "\n" not in str(ended.value)
    assert ended.value.exit_code == 5
    assert [trial.outcome for trial in trials_of(read_ledger(url))] == ["finished", "running"]


SHORT = "objective.max_steps=20"


def test_another_sweep_in_the_same_folder_is_refused_and_more_budget_is_not(moods: Moods, workspace: Path) -> None:
    """Nor does it cost a trial that has ended that a checkpoint of the next one could not be written."""
    in_the_way = workspace / "runs" / "grown" / "trials" / "search-0001"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("no folder")
    with pytest.raises(StorageError, match=f"search-0001: cannot write {in_the_way}"):
        elastrain.sweep(moods.read("grown", SHORT, ONE, "budget.per_arm=2"))
    first, _ = trials_of(read_ledger(str(workspace / "runs" / "grown")))
    assert first.outcome == "finished"
    with pytest.raises(ConflictError, match="space"):
        elastrain.sweep(moods.read("grown", SHORT, ONE, "space={optimizer.lr: {log: [1.0e-4, 1.0]}}"))
    in_the_way.unlink()
    trials = elastrain.sweep(moods.read("grown", SHORT, ONE, "budget.per_arm=3")).trials()
    assert trials[0] == first
    assert [trial.outcome for trial in trials] == ["finished"] * 3
    target = elastrain.sweep(moods.read("grown", SHORT, ONE, "budget.per_arm=3", "objective.target=0.01"))
    assert target.trials() == trials
    assert "No trial reached the target" in target.as_text()
