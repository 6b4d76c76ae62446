"""When trials are compared and may end: a pure function of the spec, alike for the plan and the run."""

from collections.abc import Sequence

from elastrain.errors import SpecError
from elastrain.spec.sweep import SweepSpec


def decisions(spec: SweepSpec) -> tuple[frozenset[int], bool]:
    """Return the steps after which trials are decided on, and whether a checkpoint of them is needed.

    Raises SpecError if the rule would never stop anybody.
    """
    objective, early = spec.objective, spec.early_stop
    every, most = objective.every, objective.max_steps
    evaluations: Sequence[int] = range(every, most, every)
    if spec.search.method == "pbt":
        return frozenset(evaluations), True
    if early is None:
        return frozenset(), False
    if early.method == "asha":
        rungs, rung = set(), early.grace
        while rung < most:
            rungs.add(-(-rung // every) * every)
            rung *= early.factor
        return frozenset(step for step in rungs if step < most), False
    if early.method == "hyperband":
        return frozenset(step for bracket in range(len(firsts(spec))) for step in rounds_of(spec, bracket)), True
    return frozenset(step for step in evaluations if step >= early.grace), False


def firsts(spec: SweepSpec) -> list[int]:
    """Return after how many evaluations each bracket prunes first, the first one never; SpecError if none ever does."""
    objective, early = spec.objective, spec.early_stop
    assert early is not None
    rounds = objective.max_steps // objective.every
    found = [rounds]
    while (first := rounds // early.factor ** len(found)) * objective.every >= early.grace:
        found.append(first)
    if len(found) == 1:
        when = f"after {first * objective.every} of {objective.max_steps} steps at the latest; lower grace or factor"
        raise SpecError(f"early_stop.grace {early.grace}: hyperband with factor {early.factor} prunes {when}")
    return found


def rounds_of(spec: SweepSpec, bracket: int) -> list[int]:
    """Return the steps after which HyperBand's bracket of this number (that of `firsts`) prunes."""
    assert spec.early_stop is not None
    first = firsts(spec)[bracket]
    return [first * spec.early_stop.factor**k * spec.objective.every for k in range(bracket)]


def expected_steps(spec: SweepSpec, trials: int) -> float:
    """Return the steps that one of `trials` trials takes on average where exactly one in `factor` passes each rung.

    All of them without a rule, with the median, which lets pass what it must, and in population-based training.
    """
    rule, most = spec.early_stop, spec.objective.max_steps
    if rule is None or rule.method == "median" or not trials:
        return float(most)
    if rule.method == "asha":
        return _halved(sorted(decisions(spec)[0]), rule.factor, most)
    steps, left, brackets = 0.0, trials, len(firsts(spec))
    while left:  # as Tune fills them: first the bracket that prunes most, each with trials for as much work
        for bracket in reversed(range(brackets)):
            size = min(left, -(-brackets * rule.factor**bracket // (bracket + 1)))
            steps += size * _halved(rounds_of(spec, bracket), rule.factor, most)
            left -= size
    return steps / trials


def _halved(rungs: Sequence[int], factor: int, most: int) -> float:
    steps, share, before = 0.0, 1.0, 0
    for rung in (*rungs, most):
        steps, share, before = steps + share * (rung - before), share / factor, rung
    return steps
