"""What is shown of a sweep while it runs, and what TensorBoard gets."""

import io
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elastrain.errors import StorageError
from elastrain.sweeps import live
from elastrain.sweeps.leaderboard import Scoring
from elastrain.sweeps.live import LiveView, best_so_far, live_line, live_table
from elastrain.sweeps.tensorboard import write_tensorboard
from elastrain.sweeps.trials import Evaluation, Outcome, Trial

SCORING = Scoring(metric="val_loss", max_steps=100)


def run(name: str, outcome: Outcome, *values: float | None, arm: str = "adamw") -> Trial:
    """A trial with an evaluation every 10 steps, a device-second each."""
    told = tuple(Evaluation(10 * n, 640 * n, value, {"acc": 0.5}, float(n)) for n, value in enumerate(values, start=1))
    return Trial(name, arm, "tune", 0, {"lr": 0.1}, 0, outcome, 10 * len(values), float(len(values)), "", told)


TRIALS = [
    run("first", "finished", 0.9, 0.3),
    run("second", "running", 0.8, 0.25, arm="[red]muon"),
    run("third", "diverged", 0.7, None),
    run("fourth", "running", None),
    run("fifth", "running"),
]


def painted(trials: list[Trial]) -> str:
    from rich.console import Console

    stream = io.StringIO()
    Console(file=stream, width=120).print(live_table(trials, SCORING))
    return stream.getvalue()


def test_the_table_shows_the_best_of_each_arm_what_runs_and_how_many_ended_how() -> None:
    lines = [line.split() for line in painted(TRIALS).splitlines()]
    assert lines[1:] == [
        ["best", "second", "[red]muon", "20/100", "0.25", "2.0", "s"],
        ["best", "first", "adamw", "20/100", "0.3", "2.0", "s"],
        ["tuning", "second", "[red]muon", "20/100", "0.25", "2.0", "s"],
        ["tuning", "fourth", "adamw", "10/100", "not", "a", "number", "1.0", "s"],
        ["tuning", "fifth", "adamw", "0/100"],
        ["1", "finished,", "1", "diverged,", "3", "running"],
    ]


def test_hundreds_of_running_trials_and_arms_fit_on_a_screen() -> None:
    text = painted([run(f"t{n}", "running", 0.5, arm=f"arm{n}") for n in range(300)])
    assert len(text.splitlines()) < 24
    assert "295 more arms · 288 more run" in text


def test_the_line_names_the_best_of_all_and_is_there_before_any_value() -> None:
    assert live_line(TRIALS, SCORING) == ("1 finished, 1 diverged, 3 running · best val_loss 0.25 (second, step 20)")
    assert live_line([], SCORING) == "none"
    assert live_line(TRIALS[-1:], SCORING) == "1 running"
    assert painted([])


def test_confirming_runs_are_no_best_and_more_can_be_better() -> None:
    trials = [replace(run("again", "finished", 0.1), phase="confirm"), *TRIALS]
    assert [trial.id for trial, _ in best_so_far(trials, SCORING)] == ["second", "first"]
    assert [trial.id for trial, _ in best_so_far(trials, replace(SCORING, goal="max"))] == ["first", "second"]


def test_the_view_looks_at_each_event_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has happened up to now may be a hundred thousand evaluations, and it is asked twice a second."""
    looked: list[str] = []

    class Event(dict[str, Any]):
        def __getitem__(self, key: str) -> Any:
            if key == "kind":
                looked.append(self.get("kind", ""))
            return super().__getitem__(key)

    told = {"samples": 640, "metrics": {}, "device_s": 1.0}
    begun = Event(kind="trial", trial="t0", arm="adamw", phase="tune", number=0, point={}, seed=0)
    evals = [Event(kind="eval", trial="t0", step=10 * n, value=1 / n, **told) for n in (1, 2, 3)]
    stream = io.StringIO()
    view = LiveView(SCORING, stream)
    monkeypatch.setattr(live, "EVERY_S", 0.0)
    for count in (1, 2, 2, 4):
        view.show([begun, *evals][:count], 1)
    assert looked == ["trial", "eval", "eval", "eval"]
    assert stream.getvalue().splitlines()[-1] == "1 at once · 1 running · best val_loss 0.3333 (t0, step 30)"


# --- TensorBoard


def events(folder: Path) -> list[tuple[str, int, float]]:
    """Tag, step and value of each event of the one file in a folder, read by its own framing."""
    from tensorboardX.proto.event_pb2 import Event

    (file,) = folder.glob("events.out.tfevents.*")
    data, at, found = file.read_bytes(), 0, []
    while at < len(data):
        length = int.from_bytes(data[at : at + 8], "little")  # then 4 bytes of checksum, the event, and 4 more
        event = Event.FromString(data[at + 12 : at + 12 + length])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        at += 16 + length
    return found


def test_tensorboard_gets_hyperparameters_and_curves_of_each_trial(tmp_path: Path) -> None:
    odd = replace(run("a/b", "finished", 0.5, math.inf), point={"lr": 0.1, "none": None, "list": [1], "flag": True})
    for _ in range(2):  # the second time replaces the first
        write_tensorboard([*TRIALS, odd], str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {*(trial.id for trial in TRIALS), "a_b"}
    tags = events(tmp_path / "first")
    assert [tag for tag, _, _ in tags][:3] == [
        *("_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info")
    ]
    curve = [(step, round(value, 6)) for tag, step, value in tags if tag == "val_loss"]
    assert curve == [(10, 0.9), (20, 0.3)]
    assert [step for tag, step, _ in events(tmp_path / "a_b") if tag == "val_loss"] == [10]  # not the infinite one


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="file"):
        write_tensorboard(TRIALS, str(tmp_path / "file"))
    with pytest.raises(StorageError, match="no local folder"):
        write_tensorboard(TRIALS, "s3://bucket/events")


def test_results_need_neither_ray_nor_torch_nor_pandas() -> None:
    import subprocess

    modules = "leaderboard, live, page, results, stats, tensorboard"
    code = f"from elastrain.sweeps import {modules}; import sys; print({{'ray', 'torch', 'pandas'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
