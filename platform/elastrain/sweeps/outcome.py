"""What a sweep came to: its files, and the specs of its best trials, which give the same values again.

`best.yaml` is a run's spec that `elastrain train` takes from any folder; in mode fair `best/<arm>.yaml` is each arm's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from elastrain import storage
from elastrain.errors import DivergedError, error_named
from elastrain.spec.document import dump
from elastrain.spec.sweep import SweepSpec
from elastrain.spec.train import TrainSpec
from elastrain.sweeps.agenda import seeds_of
from elastrain.sweeps.leaderboard import Leaderboard, Scoring, fair, search, tally
from elastrain.sweeps.page import write_html
from elastrain.sweeps.results import as_json, write_results
from elastrain.sweeps.space import Arm, edges, trial_spec
from elastrain.sweeps.tensorboard import write_tensorboard
from elastrain.sweeps.trials import Trial, trials_of


def scoring_of(spec: SweepSpec, arms: Sequence[Arm], trials: Sequence[Trial] = ()) -> Scoring:
    """Return by what trials are compared; with `trials` also which fields' best values lie on the edges of ranges."""
    objective = spec.objective
    found = [(arm, best_of(trials, arm.name, objective.goal)) for arm in arms] if trials else []
    return Scoring(
        metric=objective.metric,
        goal=objective.goal,
        target=objective.target,
        max_steps=objective.max_steps,
        baseline=next((arm.name for arm in arms if arm.baseline), "") if spec.mode == "fair" else "",
        seeds=seeds_of(arms[0], spec.confirm) if spec.confirm and spec.confirm.studies else (),
        edges={arm.name: edges(arm, best.point) for arm, best in found if best is not None},
    )


def best_of(trials: Sequence[Trial], arm: str | None, goal: str) -> Trial | None:
    """Return the tuned trial of an arm (None: of all) that is best; None if none came to its end.

    Where points were confirmed it is the one whose mean over seeds is best. Who was pruned has had less time, and does
    not count.
    """
    sign = 1.0 if goal == "min" else -1.0
    finished = [
        (sign * trial.value, trial)
        for trial in trials
        if trial.outcome == "finished" and trial.value is not None and arm in (None, trial.arm)
    ]
    confirmed: dict[tuple[str, int], list[float]] = {}
    for value, trial in finished:
        if trial.phase == "confirm":
            confirmed.setdefault((trial.arm, trial.number), []).append(value)

    def rank(entry: tuple[float, Trial]) -> tuple[bool, float, str]:
        value, trial = entry
        values = confirmed.get((trial.arm, trial.number), [])
        return bool(confirmed) and not values, sum(values) / len(values) if values else value, trial.id

    tuned = min((entry for entry in finished if entry[1].phase == "tune"), key=rank, default=None)
    return None if tuned is None else tuned[1]


def conclude(
    url: str, spec: SweepSpec, arms: Sequence[Arm], events: Sequence[Mapping[str, Any]], *, wall_s: float
) -> tuple[dict[str, Any], Leaderboard]:
    """Write the files of a sweep; return what `elastrain sweep --json` prints, and the leaderboard.

    Raises StorageError; and if no trial came to its end, what the trials met if they all met the same kind of error, or
    DivergedError.
    """
    trials = trials_of(events)
    scoring = scoring_of(spec, arms, trials)
    board = _board(spec, arms, trials, scoring)
    write_results(url, board, trials)
    write_html(url, board, trials, times=_times(events))
    if storage.is_local(url):
        write_tensorboard(trials, storage.join(url, "tensorboard"), scoring.metric)
    best = best_of(trials, None, spec.objective.goal)
    if best is None:
        raise _nothing(url, trials)
    by_name = {arm.name: arm for arm in arms}
    for arm in arms if spec.mode == "fair" else ():
        if own := best_of(trials, arm.name, spec.objective.goal):
            storage.put(storage.join(url, "best", f"{arm.name}.yaml"), dump(_again(spec, arm, own)).encode())
    place = storage.join(url, "best.yaml")
    storage.put(place, dump(_again(spec, by_name[best.arm], best)).encode())
    result = {
        "sweep": url,
        "trials": tally(trials),
        "best": place,
        "best_value": best.value,
        "best_trial": best.id,
        "point": dict(best.point),
        "leaderboard": as_json(board),
        "report": storage.join(url, "report.html"),
        "wall_s": wall_s,
    }
    return result, board


def _board(spec: SweepSpec, arms: Sequence[Arm], trials: Sequence[Trial], scoring: Scoring) -> Leaderboard:
    if spec.mode == "fair":
        return fair(trials, scoring, [arm.name for arm in arms])
    return search(trials, scoring)


def _again(spec: SweepSpec, arm: Arm, trial: Trial) -> TrainSpec:
    """Return the run of a trial by itself: on as many workers, with the slots that the trial had."""
    name = f"{spec.name}-{arm.name}-best" if spec.mode == "fair" else f"{spec.name}-best"
    run = trial_spec(arm, trial.point, name=name, storage=spec.storage, seed=trial.seed)
    data = run.data.model_copy(update={"slots": run.num_slots})
    workers = run.workers.model_copy(update={"max": run.workers.min})
    return run.model_copy(update={"data": data, "workers": workers})


def _times(events: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return when each trial began and ended, in seconds from the sweep's start."""
    first = next((float(event["t"]) for event in events), 0.0)
    begun = {event["trial"]: float(event["t"]) - first for event in events if event["kind"] == "trial"}
    ended = {event["trial"]: float(event["t"]) - first for event in events if event["kind"] == "ended"}
    return {name: (begun[name], end) for name, end in ended.items() if name in begun}


def _nothing(url: str, trials: Sequence[Trial]) -> Exception:
    """Return the error of a sweep none of whose trials came to its end."""
    words = ", ".join(f"{count} {outcome}" for outcome, count in tally(trials).items() if count)
    first = next((trial.error.strip() for trial in trials if trial.error), "no trial was run")
    text = f"{url}: no trial came to its end ({words}); the first one: {first[-1500:]}"
    kinds = {trial.error_kind for trial in trials}
    return error_named(kinds.pop(), text) if len(kinds) == 1 and "" not in kinds else DivergedError(text)
