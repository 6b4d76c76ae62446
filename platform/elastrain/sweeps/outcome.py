"""What a sweep came to: its files, and the specs of its best trials, which give the same values again.

`best.yaml` is a run's spec that `elastrain train` takes from any folder; in mode fair `best/<arm>.yaml` is each arm's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from elastrain import storage
from elastrain.errors import DivergedError, error_named
from elastrain.spec.document import dump
from elastrain.spec.sweep import SweepSpec
from elastrain.spec.train import TrainSpec
from elastrain.sweeps.agenda import seeds_of
from elastrain.sweeps.leaderboard import Leaderboard, Scoring, best_trials, fair, search, standing, tally
from elastrain.sweeps.page import write_html
from elastrain.sweeps.results import FILES, as_json, write_results
from elastrain.sweeps.search import FRUITLESS
from elastrain.sweeps.space import Arm, edges, trial_spec
from elastrain.sweeps.stats import Goal
from elastrain.sweeps.tensorboard import write_tensorboard
from elastrain.sweeps.trials import Trial, trials_of

BEST, BEST_OF_ARMS, REPORT, TENSORBOARD = "best.yaml", "best", "report.html", "tensorboard"
OUTPUTS = (BEST, BEST_OF_ARMS, REPORT, TENSORBOARD, *FILES)


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


def best_of(trials: Sequence[Trial], arm: str | None, goal: Goal) -> Trial | None:
    """Return the tuned trial of an arm (None: of all) that is best; None if none came to its end.

    Where points were confirmed it is the one of which most runs finished, and of those the one whose mean is best. Who
    was pruned has had less time, and does not count.
    """
    mine = [trial for trial in trials if arm in (None, trial.arm)]
    confirmed: dict[tuple[str, int], list[Trial]] = {}
    for trial in mine:
        if trial.phase == "confirm" and trial.outcome != "running":
            confirmed.setdefault((trial.arm, trial.number), []).append(trial)

    def rank(trial: Trial) -> tuple[int, int, float, str]:
        runs = confirmed.get((trial.arm, trial.number))
        missing, loss = standing(runs or [trial], goal)
        group = 1 if runs is None else 2 if missing == len(runs) else 0
        return group, missing, loss, trial.id

    return min(best_trials(mine, goal), key=rank, default=None)


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
    gave_up = _gave_up(events)
    board = replace(board, notes=(*board.notes, *gave_up, *_changed_on_the_way(events)))
    write_results(url, board, trials)
    write_html(url, board, trials, times=_times(events))
    if storage.is_local(url):
        write_tensorboard(trials, storage.join(url, TENSORBOARD), scoring.metric)
    found = {row.arm: best_of(trials, row.arm, spec.objective.goal) for row in board.rows}
    ranked = [trial for trial in found.values() if trial is not None]  # best arm first, as the leaderboard has them
    place = _write_best(url, spec, arms, ranked)
    if not ranked:
        raise _nothing(url, trials, gave_up)
    best = ranked[0]
    result = {
        "sweep": url,
        "trials": tally(trials),
        "best": place,
        "best_value": best.value,
        "best_trial": best.id,
        "point": dict(best.point),
        "leaderboard": as_json(board),
        "report": storage.join(url, REPORT),
        "wall_s": wall_s,
    }
    return result, board


def losers(spec: SweepSpec, trials: Sequence[Trial]) -> list[str]:
    """Return the trials whose checkpoints nobody needs: all that have ended but each arm's best and its confirmed runs.

    Of a population none: its trials are made of one another's checkpoints.
    """
    if spec.search.method == "pbt":
        return []
    bests = [best_of(trials, arm, spec.objective.goal) for arm in dict.fromkeys(trial.arm for trial in trials)]
    kept = {(best.arm, best.number) for best in bests if best is not None}
    ended = [trial for trial in trials if trial.outcome != "running"]
    return [trial.id for trial in ended if trial.phase == "defaults" or (trial.arm, trial.number) not in kept]


def _board(spec: SweepSpec, arms: Sequence[Arm], trials: Sequence[Trial], scoring: Scoring) -> Leaderboard:
    if spec.mode == "fair":
        return fair(trials, scoring, [arm.name for arm in arms])
    return search(trials, scoring)


def _write_best(url: str, spec: SweepSpec, arms: Sequence[Arm], ranked: Sequence[Trial]) -> str:
    """Write the specs of the best trials, an arm's each, best first; return where that of the first one is.

    What an earlier attempt wrote of an arm that has none is removed.
    """
    place, own = storage.join(url, BEST), {trial.arm: trial for trial in ranked}
    for arm in arms if spec.mode == "fair" else ():
        part = storage.join(url, BEST_OF_ARMS, f"{arm.name}.yaml")
        if arm.name in own:
            storage.put(part, dump(_again(spec, arm, own[arm.name])).encode())
        else:
            storage.remove(part)
    if not ranked:
        storage.remove(place)
        return place
    first = next(arm for arm in arms if arm.name == ranked[0].arm)
    storage.put(place, dump(_again(spec, first, ranked[0])).encode())
    return place


def _again(spec: SweepSpec, arm: Arm, trial: Trial) -> TrainSpec:
    """Return the run of a trial by itself: on as many workers, with the slots that the trial had."""
    name = f"{spec.name}-{arm.name}-best" if spec.mode == "fair" else f"{spec.name}-best"
    run = trial_spec(arm, trial.point, name=name, storage=spec.storage, seed=trial.seed)
    data = run.data.model_copy(update={"slots": run.num_slots})
    workers = run.workers.model_copy(update={"max": run.workers.min})
    return run.model_copy(update={"data": data, "workers": workers})


def _gave_up(events: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence an arm that ended before its budget did."""
    return [
        f"{arm}: given up with some of its budget left, since {FRUITLESS} trials in a row ended before an evaluation."
        for arm in dict.fromkeys(event["arm"] for event in events if event["kind"] == "gave_up")
    ]


def _changed_on_the_way(events: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what is to be known of trials that took over other ones' weights."""
    if not any(event["kind"] == "exploit" for event in events):
        return []
    return [
        "Trials of pbt took over weights and changed their settings on the way: best.yaml has the last settings from "
        "its start, and does not give the same value again."
    ]


def _times(events: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return when each trial began and ended, in seconds from the sweep's start."""
    first = next((float(event["t"]) for event in events), 0.0)
    begun = {event["trial"]: float(event["t"]) - first for event in events if event["kind"] == "trial"}
    ended = {event["trial"]: float(event["t"]) - first for event in events if event["kind"] == "ended"}
    return {name: (begun[name], end) for name, end in ended.items() if name in begun}


def _nothing(url: str, trials: Sequence[Trial], gave_up: Sequence[str]) -> Exception:
    """Return the error of a sweep none of whose trials came to its end."""
    words = ", ".join(f"{count} {outcome}" for outcome, count in tally(trials).items() if count)
    first = next((trial.error.strip() for trial in trials if trial.error), "no trial was run")
    text = " ".join([f"{url}: no trial came to its end ({words}); the first one: {first[-1500:]}", *gave_up])
    kinds = {trial.error_kind for trial in trials}
    return error_named(kinds.pop(), text) if len(kinds) == 1 and "" not in kinds else DivergedError(text)
