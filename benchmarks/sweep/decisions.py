"""Ours with early stopping: how long a worker waits after an evaluation, and from one trial's end to the next.

Both are seen from within the task, from the last batch of an evaluation to the next batch that is trained on: the sums
over workers, the report, Tune's scheduler, the word that comes back, and for the next trial its order, model and rows.
"""

import os
import statistics
import tempfile
from pathlib import Path

from benchmarks.script import finish, options
from benchmarks.sweep import moments
from benchmarks.sweep.left import left_behind
from benchmarks.sweep.ours import spec_of
from benchmarks.sweep.work import EVERY

import elastrain
from elastrain.elastic.session import ray_session

SEARCH = {
    "space": {"optimizer.lr": {"log": [1e-4, 1e-1]}, "task_args.hidden": {"int_log": [32, 128]}},
    "search": {"method": "quasirandom", "seed": 0},
    "early_stop": {"method": "median", "grace": EVERY},
}
BOUNDS = {"decision_bound_s": 0.1, "next_bound_s": 1.0}


def main() -> None:
    """Run a sweep in which every evaluation but the last is decided on, and many trials stop; report."""
    given = {**options(), "workers": 1}
    with tempfile.TemporaryDirectory() as name, ray_session(None, cpus=max(2, os.cpu_count() or 1)):
        notes = Path(name, "notes")
        notes.mkdir()
        task = {"task": "benchmarks.sweep.task:Noted", "task_args": {"notes": str(notes)}}
        spec = spec_of(Path(name), given, task=task, **SEARCH)
        found = elastrain.sweep(spec)
        left, trials = left_behind(), found.trials()
        waited = moments.read(str(notes))
    if failed := [trial.error for trial in trials if trial.outcome == "failed"]:
        raise SystemExit(f"{len(failed)} trials failed: {failed[0]}")
    pruned = sum(trial.outcome == "pruned" for trial in trials)
    measures = {
        "decision_p50_s": statistics.median(waited["same"]),
        "decision_p99_s": waited["same"][int(0.99 * len(waited["same"]))],
        "next_p50_s": statistics.median(waited["next"]),
        "next_most_s": waited["next"][-1],
        "pruned": pruned,
        "decisions": len(waited["same"]),
    }
    finish({**measures, **BOUNDS}, {"trials": len(trials), "left_behind": left})


if __name__ == "__main__":
    main()
