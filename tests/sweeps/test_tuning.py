"""What stands on Ray Tune's inner interfaces: its own schedulers, moved by trials without processes behind them."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import ray
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import HyperBandScheduler, TrialScheduler
from tests.sweeps.texts import FAIR, SEARCH

from elastrain.errors import SpecError
from elastrain.spec.sweep import SweepSpec
from elastrain.sweeps.agenda import Agenda
from elastrain.sweeps.document import base_of
from elastrain.sweeps.rungs import decisions, firsts
from elastrain.sweeps.schedulers import Brackets, scheduler_of
from elastrain.sweeps.space import Arm, arms_of
from elastrain.sweeps.tuning import BEGIN, WORST, PerStudy, Proposals, TrialActor

Read = Callable[..., SweepSpec]
ASHA = "early_stop={method: asha, grace: 20, factor: 3}"
MEDIAN = "early_stop={method: median, grace: 40}"
HYPERBAND = "early_stop={method: hyperband, grace: 20, factor: 3}"
PBT = ("search.method=pbt", "early_stop=null", "space={optimizer.lr: {log: [1.0e-4, 0.1]}}")
LONG = ("objective.every=20", "objective.max_steps=180")


# --- after which steps there is a decision


@pytest.mark.parametrize(
    ("sets", "steps", "saves"),
    [
        ((ASHA,), {20, 60, 180}, False),
        ((ASHA, "objective.every=50"), {50, 100}, False),  # 20, 60 and 180 are seen at 50, 100 and 200, the end
        ((ASHA, "objective.every=70"), {70, 0 + 70}, False),
        ((MEDIAN,), {40, 60, 80, 100, 120, 140, 160, 180}, False),
        ((HYPERBAND, *LONG), {20, 60}, True),
        ((HYPERBAND, "objective.max_steps=200"), {20, 60}, True),  # 10 rounds: first after 1 and 3, then 3
        (("early_stop={method: hyperband, grace: 41, factor: 3}", *LONG), {60}, True),
        (PBT, set(range(20, 200, 20)), True),
        (("early_stop=null",), set(), False),
    ],
)
def test_decisions_fall_on_evaluations_before_the_end(
    read: Read, sets: Sequence[str], steps: set[int], saves: object
) -> None:
    assert decisions(read(SEARCH, *sets)) == (frozenset(steps), saves)


# --- a controller and trials without processes


@dataclass(eq=False)
class Fake:
    """A trial as schedulers see it."""

    trial_id: str
    config: dict[str, Any]
    status: str = TuneTrial.PENDING
    is_saving: bool = False
    last_result: dict[str, Any] = field(default_factory=dict)
    checkpoint: Any = None

    def is_finished(self) -> bool:
        """Say whether it has ended."""
        return self.status in (TuneTrial.TERMINATED, TuneTrial.ERROR)

    @property
    def run_metadata(self) -> Any:
        """Return itself, as for all that schedulers look for in it."""
        return self

    temporary_state = checkpoint_manager = property(lambda self: self)
    checkpoint_config = property(lambda self: self)
    num_to_keep = saving_to = None
    experiment_tag = ""
    _latest_checkpoint_result: Any = None

    def set_config(self, config: dict[str, Any]) -> None:
        """Give it other settings."""
        self.config = config

    def set_experiment_tag(self, tag: str) -> None:
        """Nobody reads it."""


class Bench:
    """Tune's controller as far as schedulers use it. It runs `slots` trials at a time, each to its own curve."""

    search_alg = None

    def __init__(self, spec: SweepSpec, arms: Sequence[str] = ("search",), *, slots: int = 2, **of: Any) -> None:
        self.spec, self.slots = spec, slots
        self.words: list[tuple[str, str]] = []
        made = of.get("make", lambda: scheduler_of(spec, of.get("explore", lambda config: config)))
        self.went_on: list[tuple[str, int]] = []
        self.scheduler = PerStudy(
            made,
            lambda trial, outcome: self.words.append((trial, outcome)),
            lambda trial, result: self.went_on.append((trial, result["step"])),
        )
        self.trials: list[Any] = []
        self.steps: dict[str, int] = {}
        self.outcomes: dict[str, str] = {}
        self.arms = arms

    def add(self, name: str, /, arm: str = "search", phase: str = "tune", **config: Any) -> Any:
        """Add a trial."""
        trial = Fake(name, {"arm": arm, "phase": phase, "study": 0, "point": {}, **config})
        self.trials.append(trial)
        self.scheduler.on_trial_add(self, trial)  # type: ignore[arg-type]
        return trial

    def get_trials(self) -> list[Any]:
        """Return all trials."""
        return self.trials

    def get_live_trials(self) -> set[Any]:
        """Return those that have not ended."""
        return {trial for trial in self.trials if not trial.is_finished()}

    def pause_trial(self, trial: Any, **_: Any) -> None:
        """As Tune's, for a trial that takes over another one's checkpoint."""
        trial.status = TuneTrial.PAUSED

    def _schedule_trial_save(self, trial: Any, result: dict[str, Any]) -> Any:
        """Of the one whose result completes a round of PBT there is no checkpoint yet."""
        return {"run": trial.trial_id, "step": result["step"]}

    def stop_trial(self, trial: Any) -> None:
        """As Tune's: a trial that pauses is removed, one that runs completes."""
        if trial.status in (TuneTrial.PENDING, TuneTrial.PAUSED):
            self.scheduler.on_trial_remove(self, trial)
        else:
            self.scheduler.on_trial_complete(self, trial, trial.last_result)
        self.outcomes[trial.trial_id] = trial.last_result.get("outcome") or "pruned"
        trial.status = TuneTrial.TERMINATED

    def result(self, trial: Any, step: int, value: float, outcome: str = "", *, recorded: bool = False) -> str:
        """Report; return what was decided, after it was done."""
        trial.status = TuneTrial.RUNNING
        told = {"step": step, "round": step // self.spec.objective.every, "objective": value, "outcome": outcome}
        result = told | {"done": bool(outcome), "recorded": recorded}
        self.steps[trial.trial_id] = step
        decision = TrialScheduler.STOP
        if not outcome:
            decision = self.scheduler.on_trial_result(self, trial, result)
        trial.last_result = result
        if decision == TrialScheduler.STOP:
            self.stop_trial(trial)
        elif decision == TrialScheduler.PAUSE:
            trial.status, trial.checkpoint = TuneTrial.PAUSED, {"run": trial.trial_id, "step": step}
        return decision

    def run(self, value: Callable[[str, int], float], ends: dict[str, int] | None = None, most: int = 2000) -> None:
        """Run all to their end; a trial in `ends` diverges at that step. Fails if nobody can go on."""
        objective, ends = self.spec.objective, ends or {}
        at, _ = decisions(self.spec)
        for _ in range(most):
            running = [trial for trial in self.trials if trial.status == TuneTrial.RUNNING]
            if len(running) < self.slots:
                pending = [trial for trial in self.trials if trial.status == TuneTrial.PENDING]
                chosen: Any = self.scheduler.choose_trial_to_run(self) or next(iter(pending), None)
                if chosen is not None:
                    chosen.status = TuneTrial.RUNNING
                    if chosen._latest_checkpoint_result is not None:
                        self.steps[chosen.trial_id] = chosen._latest_checkpoint_result.checkpoint["step"]
                    continue
            if not running:
                assert not self.get_live_trials(), f"all wait: {[t.trial_id for t in self.get_live_trials()]}"
                return
            trial = running[0]
            self.trials.sort(key=lambda each: each is trial)  # next time another one
            step = min(s for s in (*at, objective.max_steps) if s > self.steps.get(trial.trial_id, 0))
            if trial.trial_id in ends and ends[trial.trial_id] <= step:
                self.result(trial, ends[trial.trial_id], WORST, "diverged")
            else:
                end = "finished" if step == objective.max_steps else ""
                self.result(trial, step, value(trial.trial_id, step), end)
        raise AssertionError("it does not come to an end")


def number(trial: str) -> float:
    return float(trial[1:])


def flat(trial: str, step: int) -> float:
    """Trial t3 is worse than t2 at each step."""
    return number(trial) + 1 / step


# --- each arm by itself, and what does not count


def test_arms_are_never_compared_with_one_another(read: Read) -> None:
    bench = Bench(read(SEARCH, ASHA))
    for arm, offset in (("good", 0), ("bad", 100)):
        for place in range(3):
            trial = bench.add(f"t{offset + place}", arm)
            assert bench.result(trial, 20, float(offset - place)) == TrialScheduler.CONTINUE  # each better than before
    worse = bench.add("t9", "bad")
    assert bench.result(worse, 20, 101.0) == TrialScheduler.STOP
    assert bench.words == [("t9", "pruned")]


def test_studies_of_an_arm_are_tuned_apart(read: Read) -> None:
    bench = Bench(read(SEARCH, ASHA))
    for place in range(4):
        bench.result(bench.add(f"t{place}", study=0), 20, 0.1)
    assert bench.result(bench.add("t8", study=1), 20, 99.0) == TrialScheduler.CONTINUE
    assert bench.result(bench.add("t9", study=0), 20, 99.0) == TrialScheduler.STOP


def test_what_is_confirmed_and_what_has_defaults_is_never_stopped(read: Read) -> None:
    bench = Bench(read(SEARCH, ASHA))
    for place in range(4):
        bench.result(bench.add(f"t{place}"), 20, 0.1)
    for phase in ("confirm", "defaults"):
        assert bench.result(bench.add(f"x{phase}", phase=phase), 20, 99.0) == TrialScheduler.CONTINUE
    assert bench.words == []


@pytest.mark.parametrize("goal", ["min", "max"])
@pytest.mark.parametrize("early", [ASHA, MEDIAN])
def test_a_trial_that_diverged_keeps_no_bad_one_alive(read: Read, early: str, goal: str) -> None:
    sign = 1 if goal == "min" else -1
    spec = read(SEARCH, early, f"objective.goal={goal}", "objective.target=null")
    decided = []
    for diverged in (0, 5):
        bench = Bench(spec)
        for place in range(diverged):
            bench.result(bench.add(f"n{place}"), 40, sign * WORST, "diverged")
        for value in (0.5, 0.6, 0.7):
            bench.result(bench.add(f"t{value}"), 40, sign * value)
        decided.append(bench.result(bench.add("t9"), 40, sign * 5.0))
    assert decided == [TrialScheduler.STOP, TrialScheduler.STOP]


def test_median_never_pauses_a_trial_of_which_there_is_no_checkpoint(read: Read) -> None:
    bench = Bench(read(SEARCH, MEDIAN))
    first = bench.add("t0")
    bench.add("t1")  # waits for its actor
    assert bench.result(first, 40, 0.5) == TrialScheduler.CONTINUE


def test_median_stops_who_is_worse_than_half(read: Read) -> None:
    bench = Bench(read(SEARCH, MEDIAN))
    for place in range(4):
        trial = bench.add(f"t{place}")
        for step in (40, 60):
            assert bench.result(trial, step, float(-place)) == TrialScheduler.CONTINUE
    assert bench.result(bench.add("t9"), 60, 1.0) == TrialScheduler.STOP


def test_a_trial_whose_actor_is_lost_ends_at_the_desk(read: Read) -> None:
    bench = Bench(read(SEARCH, ASHA))
    trial = bench.add("t0")
    bench.scheduler.on_trial_error(bench, trial)
    assert bench.words == [("t0", "failed")]


@pytest.mark.parametrize("early", [ASHA, MEDIAN])
def test_what_was_recorded_is_compared_with_and_not_decided_on_again(read: Read, early: str) -> None:
    """After a kill trials come in the order of their numbers, and the last one had reported first."""
    bench = Bench(read(SEARCH, early))
    for place in range(4):
        assert bench.result(bench.add(f"t{place}"), 60, float(place), recorded=True) == TrialScheduler.CONTINUE
    assert bench.words == []
    last = bench.trials[-1]
    decision = bench.result(last, 180, 3.0)
    assert decision in (TrialScheduler.CONTINUE, TrialScheduler.STOP)
    assert bench.result(bench.add("t9"), 60, 9.0) == TrialScheduler.STOP


def test_what_had_no_word_is_decided_on_and_every_word_to_go_on_is_noted(read: Read) -> None:
    bench = Bench(read(SEARCH, ASHA))
    for place in range(4):
        bench.result(bench.add(f"t{place}"), 20, float(place), recorded=True)
    assert bench.went_on == []
    assert bench.result(bench.add("t8"), 20, -1.0) == TrialScheduler.CONTINUE
    assert bench.result(bench.add("t9"), 20, 9.0) == TrialScheduler.STOP
    assert (bench.went_on, bench.words) == ([("t8", 20)], [("t9", "pruned")])


# --- asha and hyperband


def test_asha_runs_a_third_on_at_each_rung(read: Read) -> None:
    bench = Bench(read(SEARCH, ASHA), slots=1)
    for place in range(9):
        bench.add(f"t{place}")
    bench.run(flat)
    finished = [trial for trial, outcome in bench.outcomes.items() if outcome == "finished"]
    assert len(bench.outcomes) == 9
    assert "t0" in finished
    assert len(finished) < 5


def test_tunes_own_hyperband_prunes_nobody_among_few_and_lets_none_finish(read: Read) -> None:
    """Why `Brackets` is not Tune's class: its first bracket prunes nobody, and the others stop at a power of 3."""
    spec = read(SEARCH, HYPERBAND, "objective.max_steps=200", "objective.every=20")

    def tunes() -> TrialScheduler:
        return HyperBandScheduler("round", metric="objective", mode="min", max_t=10, reduction_factor=3)

    few = Bench(spec, make=tunes)
    for place in range(3):
        few.add(f"t{place}")
    few.run(flat)
    assert set(few.outcomes.values()) == {"finished"}
    own = Bench(spec)
    for place in range(3):
        own.add(f"t{place}")
    own.run(flat)
    assert list(own.outcomes.values()).count("pruned") == 2


@pytest.mark.parametrize(("count", "finished"), [(1, 1), (2, 1), (3, 1), (5, 1), (9, 1), (14, 3), (17, 6), (26, 7)])
@pytest.mark.parametrize("slots", [1, 3])
def test_hyperband_prunes_from_the_first_bracket_on_and_who_is_left_finishes(
    read: Read, count: int, finished: int, slots: int
) -> None:
    """9 rounds, factor 3: brackets of 9 (first after 1 round), 5 (after 3) and 3 (never), then 9 again."""
    spec = read(SEARCH, HYPERBAND, *LONG)
    assert firsts(spec) == [9, 3, 1]
    bench = Bench(spec, slots=slots)
    for place in range(count):
        bench.add(f"t{place}")
    bench.run(flat)
    found = sorted(number(trial) for trial, outcome in bench.outcomes.items() if outcome == "finished")
    assert len(found) == finished
    assert found[0] == 0.0
    ended = [trial for trial, outcome in bench.words if outcome == "pruned"]
    assert sorted(ended) == sorted(trial for trial, outcome in bench.outcomes.items() if outcome == "pruned")


def test_hyperband_lets_the_last_run_past_a_power_of_its_factor(read: Read) -> None:
    bench = Bench(read(SEARCH, HYPERBAND, "objective.max_steps=200"))
    trial = bench.add("t0")
    assert [bench.result(trial, step, 0.5) for step in (20, 60, 180)] == [TrialScheduler.CONTINUE] * 3


def test_hyperband_keeps_a_bracket_whose_only_trial_has_ended(read: Read) -> None:
    bench = Bench(read(SEARCH, HYPERBAND, *LONG))
    bench.result(bench.add("t0"), 5, WORST, "diverged")
    for place in range(1, 10):
        bench.add(f"t{place}")
    bench.run(flat)
    assert list(bench.outcomes.values()).count("finished") == 1


@pytest.mark.parametrize("first", [60, 120])
def test_hyperband_goes_on_with_trials_that_resume_past_its_milestones(read: Read, first: int) -> None:
    """After a kill: what they had reported before is not told again, and the first that is lies further on."""
    bench = Bench(read(SEARCH, HYPERBAND, *LONG))
    for place in range(9):
        bench.add(f"t{place}")
    for trial in reversed(list(bench.trials)):  # the best one last: one that stops would have those who wait looked at
        bench.result(trial, first, number(trial.trial_id))
    bench.run(flat)
    assert sorted(trial for trial, outcome in bench.words if outcome == "pruned") == [f"t{at}" for at in range(1, 9)]
    assert bench.outcomes["t0"] == "finished"


@pytest.mark.parametrize("seed", range(6))
def test_hyperband_goes_on_when_trials_end_by_themselves(read: Read, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 -- no secret
    bench = Bench(read(SEARCH, HYPERBAND, *LONG), slots=chance.choice((1, 2, 4)))
    count = chance.randint(2, 20)
    for place in range(count):
        bench.add(f"t{place}")
    ends = {f"t{place}": chance.choice((5, 25, 65, 70, 150)) for place in range(count) if chance.random() < 0.4}
    bench.run(flat, ends)
    assert len(bench.outcomes) == count


def test_hyperband_keeps_to_whole_numbers_and_to_grace(read: Read) -> None:
    spec = read(SEARCH, "early_stop={method: hyperband, grace: 20, factor: 7}", "objective.max_steps=980")
    assert firsts(spec) == [49, 7, 1]  # 49 * 7**-2 is less than 1
    brackets = scheduler_of(spec, lambda config: config)
    assert isinstance(brackets, Brackets)
    first: Any = brackets._get_r0
    assert [first(s) for s in range(3)] == [49, 7, 1]
    late = read(SEARCH, "early_stop={method: hyperband, grace: 100, factor: 3}", *LONG)
    with pytest.raises(SpecError, match="grace 100: hyperband with factor 3 prunes after 60 of 180 steps"):
        decisions(late)  # before anything starts


# --- pbt


def population(read: Read, count: int, *, slots: int = 2) -> tuple[Bench, list[dict[str, Any]]]:
    donors: list[dict[str, Any]] = []

    def explore(config: dict[str, Any]) -> dict[str, Any]:
        donors.append(config)
        return {**config, "point": {"from": config["name"]}}

    bench = Bench(read(SEARCH, *PBT, f"budget.per_arm={count}", "confirm=null"), slots=slots, explore=explore)
    for place in range(count):
        bench.add(f"t{place}", name=f"t{place}")
    return bench, donors


def test_pbt_gives_the_worst_the_point_and_checkpoint_of_one_of_the_best(read: Read) -> None:
    bench, donors = population(read, 4)
    worst, best = bench.trials[3], bench.trials[0]
    for trial in (bench.trials[1], bench.trials[2], best):
        assert bench.result(trial, 20, number(trial.trial_id)) == TrialScheduler.PAUSE
    bench.result(worst, 20, 3.0)
    assert [donor["name"] for donor in donors] == ["t0"]
    assert worst.config["point"] == {"from": "t0"}
    assert worst._latest_checkpoint_result.checkpoint == {"run": "t0", "step": 20}
    assert [word for word in bench.words if word[0] == "t3"] == [("t3", "")]
    assert worst.status == TuneTrial.PAUSED


@pytest.mark.parametrize("dead", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_pbt_goes_on_when_the_one_that_all_wait_for_diverges(read: Read, dead: tuple[int, ...]) -> None:
    bench, _ = population(read, 3, slots=1)
    bench.run(flat, {f"t{place}": 50 for place in dead})
    assert sorted(bench.outcomes.values()) == ["diverged"] * len(dead) + ["finished"] * (3 - len(dead))


def test_pbt_sees_no_other_trials_than_its_arms_own(read: Read) -> None:
    bench, _ = population(read, 2)
    bench.add("t8", phase="defaults", name="t8")
    bench.add("t9", arm="other", name="t9")
    bench.run(flat)
    assert set(bench.outcomes.values()) == {"finished"}


# --- trials and proposals


class Here:
    """A desk in this process, called as an actor is."""

    def __init__(self, messages: Sequence[dict[str, Any]]) -> None:
        self.messages, self.asked = list(messages), []  # type: ignore[var-annotated]
        self.next = self

    def remote(self, trial: str, begin: Any) -> Any:
        """Return the next message."""
        self.asked.append((trial, begin))
        return self.messages.pop(0)


def message(step: int, value: float | None = 0.5, outcome: str = "") -> dict[str, Any]:
    where = {"run": "trials/a", "step": step, "device_s": step / 10}
    return {**where, "value": value, "outcome": outcome, "error": ""}


@pytest.fixture
def actor(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[TrialActor, Here]]:
    monkeypatch.setattr(ray, "get", lambda found: found)

    def made(messages: Sequence[dict[str, Any]], **given: Any) -> tuple[TrialActor, Here]:
        actor: Any = TrialActor.__new__(TrialActor)
        desk = Here(messages)
        actor._desk, actor._trial_info = desk, type("Info", (), {"trial_id": "a"})()
        begin = {
            "arm": "search",
            "phase": "tune",
            "point": {},
            "seed": 0,
            "resume": None,
            "untold": False,
            "decided": 0,
            "spent_s": 0.0,
        }
        actor.reset_config(begin | {"recorded": [], "every": 20, "worst": WORST} | given)
        return actor, desk

    return made


def test_a_trial_begins_once_and_then_goes_on(actor: Any) -> None:
    trial, desk = actor([message(20), message(40), message(60, outcome="finished")])
    results = [trial.step() for _ in range(3)]
    assert [begin is None for _, begin in desk.asked] == [False, True, True]
    assert set(desk.asked[0][1]) == set(BEGIN)
    assert [(each["step"], each["round"], each["done"]) for each in results] == [
        (20, 1, False), (40, 2, False), (60, 3, True)
    ]  # fmt: skip
    assert not any(each["recorded"] for each in results)


def test_a_value_counts_only_where_a_trial_has_one(actor: Any) -> None:
    ends = [("finished", 0.5), ("pruned", 0.5), ("diverged", WORST), ("failed", WORST), ("interrupted", WORST)]
    for outcome, counts in ends:
        trial, _ = actor([message(60, 0.5, outcome)])
        assert trial.step()["objective"] == counts
    trial, _ = actor([message(60, None, "finished")])
    assert trial.step()["objective"] == WORST


def test_what_was_recorded_is_told_before_the_desk_is_asked(actor: Any) -> None:
    trial, desk = actor([message(60)], recorded=[message(20), message(40)], resume=("trials/a", 40), spent_s=4.0)
    results = [trial.step() for _ in range(3)]
    assert [(each["step"], each["recorded"]) for each in results] == [(20, True), (40, True), (60, False)]
    (asked,) = desk.asked
    assert (asked[1]["resume"], asked[1]["spent_s"]) == (("trials/a", 40), 4.0)


def test_what_was_recorded_without_a_word_is_to_be_decided_on(actor: Any) -> None:
    trial, desk = actor([message(60)], recorded=[message(20), message(40) | {"recorded": False}])
    assert [trial.step()["recorded"] for _ in range(2)] == [True, False]
    assert desk.asked == []  # its workers wait until that is decided


def test_a_trial_goes_on_from_the_checkpoint_of_whoever_it_was_given(actor: Any) -> None:
    donor, _ = actor([message(20)])
    donor.step()
    saved = donor.save_checkpoint("")
    trial, desk = actor([message(40)], point={"optimizer.lr": 0.1})
    trial.load_checkpoint(saved)
    trial.step()
    begin = desk.asked[0][1]
    assert (begin["resume"], begin["spent_s"], begin["point"]) == (("trials/a", 20), 2.0, {"optimizer.lr": 0.1})


@pytest.fixture
def proposals(read: Read, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Proposals, Agenda]]:
    import elastrain.sweeps.tuning as module

    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.1")

    class Light(Fake):
        def __init__(self, _: str, *, config: Any, trial_id: str, **__: Any) -> None:
            super().__init__(trial_id, config)

    monkeypatch.setattr(module, "TuneTrial", Light)

    def made(text: str, *sets: str, capacity: int = 2, pauses: bool = False) -> tuple[Proposals, Agenda]:
        spec = read(text, *sets)
        arms: list[Arm] = arms_of(spec, base_of(spec))
        agenda = Agenda(spec, arms)
        storage: Any = None
        return Proposals(agenda, storage, lambda _: {}, capacity=lambda: capacity, pauses=pauses, node="n"), agenda

    return made


def test_as_many_trials_are_proposed_as_there_are_cells(proposals: Any) -> None:
    found, agenda = proposals(FAIR, capacity=2)
    first, _, third = (found.next_trial() for _ in range(3))
    assert third is None
    found.on_trial_complete(first.trial_id, {"outcome": "finished", "objective": 0.5, "step": 200, "device_s": 9.0})
    assert agenda.in_flight == 1
    assert found.next_trial() is not None
    assert not found.is_finished()


def test_all_trials_are_proposed_where_they_wait_for_one_another(proposals: Any) -> None:
    found, agenda = proposals(SEARCH, HYPERBAND, "budget.per_arm=9", pauses=True, capacity=2)
    assert sum(found.next_trial() is not None for _ in range(20)) == 9
    assert agenda.in_flight == 9


def test_a_trial_that_ends_while_it_pauses_is_paid_for(proposals: Any) -> None:
    found, agenda = proposals(SEARCH, "early_stop=null", "confirm=null", "budget={unit: steps, per_arm: 300}")
    first = found.next_trial()
    first.last_result = {"outcome": "", "objective": 0.5, "step": 100, "device_s": 9.0}
    found.on_trial_complete(first.trial_id)  # as Tune tells of it: without a result
    second = found.next_trial()
    assert second is not None
    assert found.next_trial() is None  # 100 of 300 steps are spent, and 200 may still be
    found.on_trial_complete(second.trial_id, error=True)
    assert agenda.in_flight == 0


def test_what_pbt_confirms_is_the_point_that_a_trial_ended_with(proposals: Any) -> None:
    found, agenda = proposals(SEARCH, *PBT, "budget.per_arm=2", "confirm={seeds: 1, top_k: 1}", pauses=True)
    for value in (0.5, 0.4):
        trial = found.next_trial()
        trial.config = {"point": {"optimizer.lr": value}}  # it has taken over another one's weights
        found.on_trial_complete(
            trial.trial_id, {"outcome": "finished", "objective": value, "step": 200, "device_s": 9.0}
        )
    assert agenda.next().point == {"optimizer.lr": 0.4}


def test_a_callers_process_is_what_it_was_after_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    import numpy as np
    from ray.tune.execution import class_cache

    from elastrain.sweeps.tuning import QUIET, _surroundings

    monkeypatch.setenv("TUNE_WARN_THRESHOLD_S", "3")
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    names, environment = class_cache.ENV_VARS_TO_PROPAGATE, dict(os.environ)
    drawn, drawn_by_numpy = random.random(), np.random.random()  # noqa: S311, NPY002
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    with _surroundings(7):
        inside = random.random()  # noqa: S311
        assert dict(os.environ).items() >= QUIET.items()
        assert not any(name.startswith("AWS_") for name in class_cache.ENV_VARS_TO_PROPAGATE)
    with _surroundings(7):
        assert random.random() == inside  # noqa: S311
    assert (random.random(), np.random.random()) == (drawn, drawn_by_numpy)  # noqa: S311, NPY002
    assert dict(os.environ) == environment
    assert class_cache.ENV_VARS_TO_PROPAGATE is names
