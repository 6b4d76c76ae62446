"""An agenda hands out the trials of a sweep in one order, within its budget, and the same again after a kill."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tests.sweeps.texts import FAIR, SEARCH

from elastrain.spec.sweep import SweepSpec
from elastrain.sweeps.agenda import SEED_STEP, Agenda, Proposal
from elastrain.sweeps.space import arms_of, defaults
from elastrain.sweeps.trials import Evaluation, Outcome, Trial

Read = Callable[..., SweepSpec]


@pytest.fixture
def agenda(read: Read) -> Callable[..., Agenda]:
    """Return a function from a sweep's text, overrides and known trials to its agenda."""

    def made(text: str, *sets: str, known: Any = ()) -> Agenda:
        from elastrain.sweeps.document import base_of

        spec = read(text, *sets)
        return Agenda(spec, arms_of(spec, base_of(spec)), known)

    return made


def value_of(proposal: Proposal) -> float:
    """A value that depends on the trial alone; number 2 is best."""
    return abs(proposal.number - 2) + proposal.seed / 1e6


def run(agenda: Agenda, *, at_once: int = 1, steps: int = 200, device_s: float = 10.0) -> list[Proposal]:
    """Run an agenda to its end, `at_once` trials at a time, each of so many steps and seconds."""
    order: list[Proposal] = []
    going: list[Proposal] = []
    while not agenda.is_finished() or going:
        while len(going) < at_once and (proposal := agenda.next()) is not None:
            order.append(proposal)
            going.append(proposal)
        if going:
            first = going.pop(0)
            agenda.ended(first.trial, "finished", value_of(first), step=steps, device_s=device_s)
    return order


def kinds(order: list[Proposal]) -> Counter[tuple[str, str]]:
    return Counter((proposal.arm, proposal.phase) for proposal in order)


def test_a_fair_sweep_runs_defaults_then_tunes_its_arms_in_turn_then_confirms(agenda: Callable[..., Agenda]) -> None:
    order = run(agenda(FAIR, "confirm={seeds: 3, top_k: 2}"))
    arms = ["sgd", "nesterov", "adamw"]
    assert kinds(order) == Counter(
        {(arm, phase): count for arm in arms for phase, count in (("defaults", 1), ("tune", 6), ("confirm", 6))}
    )
    assert [proposal.phase for proposal in order] == ["defaults"] * 3 + ["tune"] * 18 + ["confirm"] * 18
    tuned = [proposal for proposal in order if proposal.phase == "tune"]
    assert [proposal.arm for proposal in tuned] == arms * 6
    assert [proposal.number for proposal in tuned] == [number for number in range(6) for _ in arms]
    assert len({proposal.trial for proposal in order}) == len(order)


def test_what_is_best_is_confirmed_at_its_point_over_seeds_of_its_own(agenda: Callable[..., Agenda]) -> None:
    made = agenda(FAIR, "confirm={seeds: 3, top_k: 2}")
    order = run(made)
    points = {(each.arm, each.number): each.point for each in order if each.phase == "tune"}
    confirmed = [proposal for proposal in order if proposal.phase == "confirm" and proposal.arm == "sgd"]
    assert [each.number for each in confirmed] == [2, 2, 2, 1, 1, 1]
    assert all(each.point == points[each.arm, each.number] for each in confirmed)
    seeds = {each.seed for each in confirmed}
    tuning = {each.seed for each in order if each.phase != "confirm"}
    assert seeds == {SEED_STEP, SEED_STEP + 1, SEED_STEP + 2}
    assert tuning == {0}
    assert [(each.seed) for each in confirmed] == 2 * sorted(seeds)  # each point with the same luck


def test_a_defaults_row_has_the_point_that_nobody_tuned(agenda: Callable[..., Agenda], read: Read) -> None:
    from elastrain.sweeps.document import base_of

    spec = read(FAIR)
    arms = arms_of(spec, base_of(spec))
    found = [agenda(FAIR).next() for _ in range(1)]
    assert found[0] is not None
    assert (found[0].phase, found[0].point) == ("defaults", defaults(arms[0]))


def test_nothing_is_confirmed_before_all_tuning_has_ended(agenda: Callable[..., Agenda]) -> None:
    made = agenda(SEARCH, "budget.per_arm=2", "confirm.seeds=2")
    first, second = made.next(), made.next()
    assert first is not None
    assert second is not None
    made.ended(first.trial, "finished", 1.0, step=200, device_s=1.0)
    assert made.next() is None
    assert not made.is_finished()
    assert made.in_flight == 1
    made.ended(second.trial, "finished", 0.5, step=200, device_s=1.0)
    confirmed = [made.next(), made.next()]
    assert [each.number for each in confirmed if each] == [second.number] * 2
    assert made.is_finished()
    assert made.next() is None


def test_who_was_pruned_diverged_or_failed_is_not_confirmed(agenda: Callable[..., Agenda]) -> None:
    made = agenda(SEARCH, "budget.per_arm=4", "confirm={seeds: 1, top_k: 4}")
    ends: list[tuple[Outcome, float | None]] = [
        ("pruned", 0.1), ("diverged", None), ("finished", 0.7), ("failed", None)
    ]  # fmt: skip
    for outcome, value in ends:
        proposal = made.next()
        assert proposal is not None
        made.ended(proposal.trial, outcome, value, step=20, device_s=1.0)
    confirmed = made.next()
    assert confirmed is not None
    assert (confirmed.phase, confirmed.number) == ("confirm", 2)
    assert made.is_finished()


def test_a_larger_value_is_better_where_the_goal_says_so(agenda: Callable[..., Agenda]) -> None:
    order = run(agenda(SEARCH, "objective.goal=max", "objective.target=null", "budget.per_arm=6", "confirm.seeds=1"))
    assert order[-1].number == 5


def test_a_search_without_confirm_ends_with_its_tuning(agenda: Callable[..., Agenda]) -> None:
    order = run(agenda(SEARCH, "confirm=null", "budget.per_arm=5"), at_once=3)
    assert kinds(order) == Counter({("search", "tune"): 5})


@pytest.mark.parametrize(
    ("budget", "steps", "trials"),
    [
        ("{unit: trials, per_arm: 7}", 200, 7),
        ("{unit: steps, per_arm: 1000}", 200, 5),
        ("{unit: steps, per_arm: 1001}", 200, 6),
        ("{unit: steps, per_arm: 1000}", 100, 10),  # half of them are pruned half-way: the rest pays for others
        ("{unit: device_seconds, per_arm: 35}", 200, 4),
    ],
)
@pytest.mark.parametrize("at_once", [1, 2])
def test_each_arm_gets_its_budget(
    agenda: Callable[..., Agenda], budget: str, steps: int, trials: int, at_once: int
) -> None:
    order = run(agenda(FAIR, f"budget={budget}", "confirm.seeds=1"), steps=steps, at_once=at_once)
    tuned = Counter(proposal.arm for proposal in order if proposal.phase == "tune")
    assert tuned == dict.fromkeys(("sgd", "nesterov", "adamw"), trials)


@pytest.mark.parametrize("budget", ["{unit: steps, per_arm: 1000}", "{unit: device_seconds, per_arm: 35}"])
@pytest.mark.parametrize("outcome", ["failed", "diverged"])
def test_an_arm_whose_trials_come_to_no_evaluation_is_given_up(
    agenda: Callable[..., Agenda], budget: str, outcome: Outcome
) -> None:
    made = agenda(FAIR, f"budget={budget}", "confirm.seeds=1")
    begun: Counter[str] = Counter()
    while (proposal := made.next()) is not None:
        begun[proposal.arm] += proposal.phase == "tune"
        if proposal.arm == "sgd":
            made.ended(proposal.trial, outcome, None, step=3, device_s=0.0)
        else:
            made.ended(proposal.trial, "finished", 1.0, step=200, device_s=10.0)
        assert begun["sgd"] < 100
    assert made.is_finished()
    assert begun["sgd"] == 20
    assert begun["adamw"] < 20
    assert made.given_up == ["sgd"]


def test_a_budget_of_trials_pays_for_all_of_them(agenda: Callable[..., Agenda]) -> None:
    made = agenda(SEARCH, "budget.per_arm=30", "confirm=null")
    begun = 0
    while (proposal := made.next()) is not None:
        made.ended(proposal.trial, "failed", None, step=0, device_s=0.0)
        begun += 1
    assert (begun, made.given_up) == (30, [])


def test_an_evaluation_now_and_then_keeps_an_arm_and_each_trial_costs_the_steps_up_to_one(
    agenda: Callable[..., Agenda],
) -> None:
    made = agenda(SEARCH, "budget={unit: steps, per_arm: 2000}", "confirm=null")
    begun = 0
    while (proposal := made.next()) is not None:
        begun += 1
        made.ended(proposal.trial, "diverged", None, step=0 if begun % 20 else 100, device_s=0.0)
    assert made.given_up == []
    assert begun == 84  # 4 of 100 steps, and 80 of 20 where one was charged with less


def test_what_is_left_is_counted_to_the_end(agenda: Callable[..., Agenda]) -> None:
    made = agenda(SEARCH, "budget.per_arm=3", "confirm={seeds: 2, top_k: 2}")
    left = [made.left()]
    while (proposal := made.next()) is not None:
        made.ended(proposal.trial, "finished", value_of(proposal), step=200, device_s=1.0)
        left.append(made.left())
    assert left == [7, 6, 5, 4, 3, 2, 1, 0]


def recorded(order: list[Proposal], ended: int) -> list[Trial]:
    """The trials of an attempt that was killed after so many had ended; the others run."""
    found = []
    for place, each in enumerate(order):
        told = Evaluation(step=200, samples=1, value=value_of(each), metrics={}, device_s=10.0)
        trial = Trial(each.trial, each.arm, each.phase, each.number, each.point, each.seed, "running", 200, 10.0)
        outcome: Outcome = "finished" if place < ended else "running"
        found.append(replace(trial, outcome=outcome, evaluations=(told,)))
    return found


@pytest.mark.parametrize("method", ["quasirandom", "random"])
@pytest.mark.parametrize("ended", [0, 2, 9, 14])
def test_a_sweep_that_goes_on_says_the_same_trials_again(
    agenda: Callable[..., Agenda], method: str, ended: int
) -> None:
    sets = (f"search.method={method}", "budget.per_arm=4", "confirm={seeds: 2, top_k: 1}")
    whole = run(agenda(FAIR, *sets))
    begun = recorded(whole[: ended + 2], ended)
    again = run(agenda(FAIR, *sets, known=begun))
    assert [(e.trial, e.point, e.seed) for e in again] == [(e.trial, e.point, e.seed) for e in whole]
    assert [e.known for e in again] == [*begun, *([None] * (len(whole) - len(begun)))]


def test_a_larger_budget_goes_on_with_what_there_is(agenda: Callable[..., Agenda]) -> None:
    few, many = (f"budget.per_arm={count}" for count in (3, 5))
    whole = run(agenda(SEARCH, few, "confirm=null"))
    again = run(agenda(SEARCH, many, "confirm=null", known=recorded(whole, 3)))
    assert [e.trial for e in again[:3]] == [e.trial for e in whole]
    assert [e.known is None for e in again] == [False] * 3 + [True] * 2


def test_each_study_confirms_the_best_of_its_own_points_with_a_seed_of_its_own(agenda: Callable[..., Agenda]) -> None:
    order = run(agenda(FAIR, "confirm={seeds: 3, studies: true}", "budget.per_arm=9"))
    assert {each.study for each in order if each.phase == "tune"} == {0, 1, 2}
    for arm in ("sgd", "nesterov", "adamw"):
        tuned = [each for each in order if (each.arm, each.phase) == (arm, "tune")]
        bests = [min((each for each in tuned if each.study == study), key=value_of) for study in range(3)]
        confirmed = [each for each in order if (each.arm, each.phase) == (arm, "confirm")]
        assert [(each.number, each.seed) for each in confirmed] == [
            (best.number, SEED_STEP + study) for study, best in enumerate(bests)
        ]
        assert len({each.number for each in confirmed}) == 3


def test_a_study_of_which_nothing_ends_confirms_nothing(agenda: Callable[..., Agenda]) -> None:
    made = agenda(FAIR, "confirm={seeds: 2, studies: true}", "budget.per_arm=4")
    order: list[Proposal] = []
    while (proposal := made.next()) is not None:
        order.append(proposal)
        bad = (proposal.arm, proposal.phase, proposal.study) == ("sgd", "tune", 1)
        made.ended(proposal.trial, "diverged" if bad else "finished", None if bad else 1.0, step=200, device_s=1.0)
    confirmed = [(each.arm, each.study, each.seed) for each in order if each.phase == "confirm"]
    assert [each[1:] for each in confirmed if each[0] == "sgd"] == [(0, SEED_STEP)]
    assert [each[1:] for each in confirmed if each[0] == "adamw"] == [(0, SEED_STEP), (1, SEED_STEP + 1)]
