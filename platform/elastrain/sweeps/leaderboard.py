"""Which trial or which arm is best: rows, ranks and what must be known to believe them.

In mode search a row is a trial; a point that was confirmed is one row, with the mean over its seeds. In mode fair a row
is an arm: its best point over seeds to the end, beside its defaults, what its tuning cost, and how its trials ended.
Arms that the runs cannot tell apart share a rank.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from elastrain.sweeps.stats import (
    Estimate,
    Goal,
    beats,
    deviation,
    estimate,
    first_reached,
    loss_of,
    mean,
    median,
    p_value,
    performance_ratios,
    plain,
    profile_score,
    speed_up,
)
from elastrain.sweeps.trials import Outcome, Trial

ENDS: tuple[Outcome, ...] = ("finished", "pruned", "diverged", "failed", "running")
BySeed = dict[int, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """What is compared: a metric, whether less or more of it is good, and the value whose first reaching is timed.

    `seeds` are those that confirm where each is a study of its own, else empty.

    `edges` names for each arm, as its trials do, the fields whose best value lies on the edge of its range.
    """

    metric: str = "val_loss"
    goal: Goal = "min"
    target: float | None = None
    max_steps: int = 0
    baseline: str = ""
    seeds: tuple[int, ...] = ()
    edges: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A line of a leaderboard; what does not apply is None.

    `value` is the mean of the objective over the finished ones of `runs` runs, `sd` their standard deviation;
    `steps` and `device_s` are medians to the target over all runs, infinite where half of them missed it. `p` and the
    speed-ups compare with the baseline. Costs and `ends` are those of the arm's tuning, or of the trial.
    """

    kind: Literal["tuned", "defaults", "trial"]
    arm: str
    trial: str = ""
    rank: int | None = None
    rank_device_s: int | None = None
    runs: int = 0
    reached: int | None = None
    steps: Estimate | None = None
    device_s: Estimate | None = None
    speed_up: Estimate | None = None
    speed_up_device_s: Estimate | None = None
    p: float | None = None
    value: Estimate | None = None
    sd: float | None = None
    defaults: float | None = None
    cost_steps: int = 0
    cost_device_s: float = 0.0
    ends: Mapping[str, int] = field(default_factory=dict)
    edges: tuple[str, ...] = ()
    point: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaderboard:
    """The rows of a sweep, best first; `ranked_by` says what the ranks go by, `ends` how all its trials ended."""

    mode: Literal["search", "fair"]
    scoring: Scoring
    ranked_by: Literal["steps to target", "final value"]
    rows: tuple[Row, ...]
    ends: Mapping[str, int]
    notes: tuple[str, ...] = ()


def best_trials(trials: Sequence[Trial], goal: Goal) -> list[Trial]:
    """Return the finished trials of the tuning that have a value, best first; of equal ones the earlier."""
    ended = [trial for trial in trials if trial.phase == "tune" and trial.outcome == "finished"]
    return sorted((trial for trial in ended if _loss(trial, goal) < math.inf), key=lambda trial: _loss(trial, goal))


def _loss(trial: Trial, goal: Goal) -> float:
    return loss_of(trial.value, goal) if trial.outcome == "finished" else math.inf


def standing(runs: Sequence[Trial], goal: Goal) -> tuple[int, float]:
    """Return by what points are compared that were run over seeds: how many runs did not finish, then the mean loss."""
    losses = [loss for run in runs if (loss := _loss(run, goal)) < math.inf]
    return len(runs) - len(losses), sum(losses) / len(losses) if losses else math.inf


def tally(trials: Sequence[Trial]) -> dict[str, int]:
    """Return how many trials ended how, in the order of `ENDS`; what none did is left out."""
    found = Counter(trial.outcome for trial in trials)
    return {end: found[end] for end in ENDS if found[end]}


def in_words(ends: Mapping[str, int]) -> str:
    """Return counts as people say them.

    >>> in_words({"finished": 12, "pruned": 3})
    '12 finished, 3 pruned'
    """
    return ", ".join(f"{count} {end}" for end, count in ends.items()) or "none"


# --- runs of one point


def _key(trial: Trial) -> str:
    return json.dumps(sorted((name, plain(value)) for name, value in trial.point.items()), default=str)


def _by_point(trials: Sequence[Trial]) -> list[list[Trial]]:
    """The trials that ended, a list a point."""
    found: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.outcome != "running":
            found.setdefault(_key(trial), []).append(trial)
    return list(found.values())


def _scored(trials: Sequence[Trial], scoring: Scoring) -> list[Trial]:
    """The runs that an arm is judged by: its studies' or its best confirmed point's, else its best tuning trial alone.

    Those of studies stand with the best one first.
    """
    goal = scoring.goal
    confirmed = _by_point([trial for trial in trials if trial.phase == "confirm"])
    if scoring.seeds and confirmed:
        return sorted((run for runs in confirmed for run in runs), key=lambda run: _loss(run, goal))
    if confirmed:
        return min(confirmed, key=lambda runs: standing(runs, goal))
    return best_trials(trials, goal)[:1]


def _whole(found: BySeed, scoring: Scoring) -> BySeed:
    """Add the studies none of whose points came to an end: what they would have confirmed was never reached."""
    return {**dict.fromkeys(scoring.seeds, math.inf), **found} if found else found


def _times(runs: Sequence[Trial], scoring: Scoring) -> tuple[BySeed, BySeed]:
    """Steps and device-seconds to the target by seed; empty without a target."""
    steps, device_s = {}, {}
    for run in runs if scoring.target is not None else ():
        told = first_reached(run, scoring.target or 0.0, scoring.goal)
        steps[run.seed] = float(told.step) if told else math.inf
        device_s[run.seed] = told.device_s if told else math.inf
    return steps, device_s


def _final(runs: Sequence[Trial], goal: Goal) -> dict[str, Any]:
    values = [run.value for run in runs if run.value is not None and _loss(run, goal) < math.inf]
    return {
        "value": estimate(values, mean),
        "sd": deviation(values),
        "runs": len(runs),
    }


def _timed(steps: BySeed, device_s: BySeed) -> dict[str, Any]:
    return {
        "reached": sum(map(math.isfinite, steps.values())) if steps else None,
        "steps": estimate(list(steps.values()), median),
        "device_s": estimate(list(device_s.values()), median),
    }


def _note(runs: Sequence[Trial], what: str) -> str:
    """How runs ended that did not finish, with the last words of one that failed."""
    ends = tally([run for run in runs if run.outcome != "finished"])
    if not ends:
        return ""
    error = next((_last_line(run.error) for run in reversed(runs) if run.error), "")
    return f"{what}{in_words(ends)}{f' ({error})' if error else ''}"


def _last_line(error: str) -> str:
    lines = error.strip().splitlines()
    return lines[-1].strip()[:200] if lines else ""


# --- mode fair


def fair(trials: Sequence[Trial], scoring: Scoring, arms: Sequence[str] = ()) -> Leaderboard:
    """Return a row an arm, best first, each followed by that of its defaults; `arms` adds those without a trial yet."""
    names = list(dict.fromkeys([*arms, *(trial.arm for trial in trials)]))
    of = {name: [trial for trial in trials if trial.arm == name] for name in names}
    runs = {name: _scored(of[name], scoring) for name in names}
    found = {name: _times(runs[name], scoring) for name in names}
    times = {name: (_whole(steps, scoring), _whole(seconds, scoring)) for name, (steps, seconds) in found.items()}
    finals = {name: _whole({run.seed: _loss(run, scoring.goal) for run in runs[name]}, scoring) for name in names}
    timed = any(math.isfinite(at) for steps, _ in times.values() for at in steps.values())
    ranks = _ranks({name: steps for name, (steps, _) in times.items()} if timed else finals)
    ranks_s = _ranks({name: seconds for name, (_, seconds) in times.items()}) if timed else dict.fromkeys(names)
    rows = []
    for name in names:
        defaults = [trial for trial in of[name] if trial.phase == "defaults" and trial.outcome != "running"]
        tuned = {"rank": ranks[name], "rank_device_s": ranks_s[name], **_timed(*times[name])}
        tuned |= _against(name, times, finals, scoring, timed)
        rows.append((_tuned_row(name, of[name], runs[name], scoring, tuned), _defaults_row(name, defaults, scoring)))
    rows.sort(key=lambda pair: _order(pair[0], scoring.goal))
    flat = tuple(row for pair in rows for row in pair if row is not None)
    by: Literal["steps to target", "final value"] = "steps to target" if timed else "final value"
    notes = _notes([pair[0] for pair in rows], scoring, timed=timed)
    return Leaderboard(mode="fair", scoring=scoring, ranked_by=by, rows=flat, ends=tally(trials), notes=notes)


def _ranks(measures: Mapping[str, BySeed]) -> dict[str, int | None]:
    """One more than how many arms are told to be better; None for an arm without a run that got anywhere."""
    there = {arm: runs for arm, runs in measures.items() if any(map(math.isfinite, runs.values()))}
    ranks = {arm: 1 + sum(beats(other, runs) for other in there.values()) for arm, runs in there.items()}
    return {arm: ranks.get(arm) for arm in measures}


def _against(
    arm: str,
    times: Mapping[str, tuple[BySeed, BySeed]],
    finals: Mapping[str, BySeed],
    scoring: Scoring,
    timed: bool,  # noqa: FBT001
) -> dict[str, Any]:
    """The comparison with the baseline, of what the ranks go by."""
    base = scoring.baseline
    if base not in finals or arm == base:
        return {}
    measures = {name: steps for name, (steps, _) in times.items()} if timed else finals
    return {
        "p": p_value(measures[base], measures[arm]),
        "speed_up": speed_up(times[base][0], times[arm][0]),
        "speed_up_device_s": speed_up(times[base][1], times[arm][1]),
    }


def _tuned_row(
    arm: str, trials: Sequence[Trial], runs: Sequence[Trial], scoring: Scoring, tuned: Mapping[str, Any]
) -> Row:
    tuning = [trial for trial in trials if trial.phase == "tune"]
    defaults = [trial for trial in trials if trial.phase == "defaults" and _loss(trial, scoring.goal) < math.inf]
    if not runs:
        note = _note(tuning, "nothing to compare: ") or "no trial yet"
    elif runs[0].phase != "confirm":
        note = "not confirmed: one run, and the best of several"
    else:
        note = _note(runs, "of the runs ")
    return Row(
        kind="tuned",
        arm=arm,
        trial=runs[0].id if runs else "",
        **_final(runs, scoring.goal),
        defaults=float(np.mean([trial.value or 0.0 for trial in defaults])) if defaults else None,
        cost_steps=sum(trial.step for trial in tuning),
        cost_device_s=sum(trial.device_s for trial in tuning),
        ends=tally(tuning),
        edges=tuple(scoring.edges.get(arm, ())),
        point=runs[0].point if runs else {},
        note=note,
        **tuned,
    )


def _defaults_row(arm: str, runs: Sequence[Trial], scoring: Scoring) -> Row | None:
    if not runs:
        return None
    return Row(
        kind="defaults",
        arm=arm,
        trial=runs[0].id,
        **_final(runs, scoring.goal),
        **_timed(*_times(runs, scoring)),
        cost_steps=sum(trial.step for trial in runs),
        cost_device_s=sum(trial.device_s for trial in runs),
        ends=tally(runs),
        point=runs[0].point,
        note=_note(runs, ""),
    )


def _order(row: Row, goal: Goal) -> tuple[float, float, float, float]:
    steps, value = (part.value if part else None for part in (row.steps, row.value))
    reached = -(row.reached or 0)
    return (row.rank or math.inf, math.inf if steps is None else steps, reached, loss_of(value, goal))


def _notes(rows: Sequence[Row], scoring: Scoring, *, timed: bool) -> tuple[str, ...]:
    notes = []
    if scoring.target is not None and not timed:
        notes.append(f"No arm reached the target of {scoring.target:g}: ranked by the final {scoring.metric}.")
    fewest = min((row.runs for row in rows if row.runs), default=0)
    if 0 < fewest < 4 and len(rows) > 1:
        notes.append(f"With {fewest} run{'s' * (fewest > 1)} of an arm nothing can be told apart at 5 %: take 5 seeds.")
    tied = Counter(row.rank for row in rows if row.rank)
    notes += [
        f"{count} arms share rank {rank}: the runs do not tell them apart." for rank, count in tied.items() if count > 1
    ]
    notes += [
        f"{row.arm}: the best {name} is on the edge of its range; widen it." for row in rows for name in row.edges
    ]
    return tuple(notes)


def across(boards: Mapping[str, Leaderboard]) -> dict[str, float]:
    """Return each arm's score over several workloads: the integral of its performance profile, 0..1, best first.

    A workload's time is the median of device-seconds to target; an arm that a board does not have missed there.
    Source: AlgoPerf, arXiv 2306.07179. Empty without boards.
    """
    tuned = [{row.arm: row.device_s for row in board.rows if row.kind == "tuned"} for board in boards.values()]
    arms = dict.fromkeys(arm for board in tuned for arm in board)
    times = {arm: [told.value if (told := board.get(arm)) else math.inf for board in tuned] for arm in arms}
    scores = {arm: profile_score(ratios) for arm, ratios in performance_ratios(times).items()}
    return dict(sorted(scores.items(), key=lambda item: -item[1]))


# --- mode search


def search(trials: Sequence[Trial], scoring: Scoring) -> Leaderboard:
    """Return a row a trial: confirmed points, those of which all runs finished first, by the mean over their seeds.

    Then comes what finished, by its last value, and without a rank what runs, was pruned, diverged and failed.
    """
    confirmed = {_key(runs[0]): runs for runs in _by_point([trial for trial in trials if trial.phase == "confirm"])}
    tried = [trial for trial in trials if trial.phase != "confirm"]
    firm = [
        _confirmed_row(runs, [one for one in tried if _key(one) == key], scoring) for key, runs in confirmed.items()
    ]
    single = [_trial_row(trial, scoring) for trial in tried if _key(trial) not in confirmed]
    rows = sorted([*firm, *single], key=lambda row: _place(row, scoring.goal))
    placed = (replace(row, rank=place if "finished" in row.ends else None) for place, row in enumerate(rows, start=1))
    edges = dict.fromkeys(name for names in scoring.edges.values() for name in names)
    notes = [f"The best {name} is on the edge of its range; widen it." for name in edges]
    if scoring.target is not None and not any(row.reached for row in rows):
        notes.insert(0, f"No trial reached the target of {scoring.target:g}.")
    told: dict[str, Any] = {"rows": tuple(placed), "ends": tally(trials), "notes": tuple(notes)}
    return Leaderboard(mode="search", scoring=scoring, ranked_by="final value", **told)


def _confirmed_row(runs: Sequence[Trial], tried: Sequence[Trial], scoring: Scoring) -> Row:
    return Row(
        kind="trial",
        arm=runs[0].arm,
        trial=(tried or runs)[0].id,
        **_final(runs, scoring.goal),
        **_timed(*_times(runs, scoring)),
        cost_steps=sum(trial.step for trial in (*tried, *runs)),
        cost_device_s=sum(trial.device_s for trial in (*tried, *runs)),
        ends=tally(runs),
        point=runs[0].point,
        note=_note(runs, "of the runs ") or "confirmed",
    )


def _trial_row(trial: Trial, scoring: Scoring) -> Row:
    return Row(
        kind="trial",
        arm=trial.arm,
        trial=trial.id,
        runs=1,
        **_timed(*_times([trial], scoring)),
        value=None if trial.value is None else Estimate(trial.value),
        cost_steps=trial.step,
        cost_device_s=trial.device_s,
        ends=tally([trial]),
        point=trial.point,
        note=_last_line(trial.error) or ("defaults" if trial.phase == "defaults" else ""),
    )


def _place(row: Row, goal: Goal) -> tuple[float, bool, int, float]:
    outcome = next(iter(row.ends))  # the best of them: `ENDS` is in that order but for what still runs
    place = 0.5 if outcome == "running" else ENDS.index(outcome)
    missing = sum(row.ends.values()) - row.ends.get("finished", 0)
    return (place, row.runs < 2, missing, loss_of(row.value.value if row.value else None, goal))
