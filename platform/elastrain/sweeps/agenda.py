"""Which trials a sweep runs, and in what order: the tuning of all arms in turn, then what is confirmed over seeds.

A sweep that goes on says the same trials again, in the same order; those that the ledger knows are told from it.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from elastrain.spec.sweep import ConfirmSpec, SweepSpec
from elastrain.sweeps.search import Search, budget_of
from elastrain.sweeps.space import Arm, defaults
from elastrain.sweeps.trials import Outcome, Trial, TrialPhase

SEED_STEP = 1000  # between the seed that is tuned with and those that confirm


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """A trial to run, compared in its tuning with those of its `study` alone.

    `known` is what an earlier attempt has recorded of it.
    """

    trial: str
    arm: str
    phase: TrialPhase
    number: int
    point: Mapping[str, Any]
    seed: int
    study: int
    known: Trial | None = None


class Agenda:
    """Hands out trials by `next`, and is told by `ended` how each came out."""

    def __init__(self, spec: SweepSpec, arms: Sequence[Arm], known: Sequence[Trial] = ()) -> None:
        self._spec, self._known = spec, {trial.id: trial for trial in known}
        self._searches = {arm.name: _search(arm, spec) for arm in arms}
        self._turn = deque(self._searches)
        self._queue: deque[Proposal] = deque()
        self._under_way: dict[str, Proposal] = {}
        self._done: list[tuple[Proposal, str, float | None]] = []
        self._confirmed = False
        if spec.mode == "fair":
            self._queue += [self._proposal(arm, "defaults", 0, defaults(arm), arm.base.data.seed) for arm in arms]

    @property
    def seed(self) -> int:
        """The seed of the search."""
        return self._spec.search.seed

    @property
    def in_flight(self) -> int:
        """How many trials have begun and not ended."""
        return len(self._under_way)

    def next(self) -> Proposal | None:
        """Return the next trial, None if none can begin now."""
        proposal = self._queue.popleft() if self._queue else self._tuned() or self._confirming()
        if proposal is not None:
            self._under_way[proposal.trial] = proposal
        return proposal

    def ended(
        self,
        trial: str,
        outcome: Outcome,
        value: float | None,
        *,
        step: int,
        device_s: float,
        point: Mapping[str, Any] | None = None,
    ) -> None:
        """Take note of how a trial came out: its value at the end, None where it has none that counts.

        `point` is the one that it had at its end, where that is not the one that it was proposed with.
        """
        proposal = self._under_way.pop(trial)
        proposal = proposal if point is None else replace(proposal, point=dict(point))
        self._done.append((proposal, outcome, value))
        if proposal.phase == "tune":
            search = self._searches[proposal.arm]
            search.budget.spent(step, device_s)
            search.tell(proposal.number, value, outcome, step=step)

    @property
    def given_up(self) -> list[str]:
        """The arms that ended before their budget did, none of whose last trials came to an evaluation."""
        return [name for name, search in self._searches.items() if search.gave_up]

    def is_finished(self) -> bool:
        """Say whether all has been handed out."""
        return self._confirmed and not self._queue

    def left(self) -> float:
        """Return how many trials are still to be run, those under way among them, as far as that is known."""
        tuned = sum(_trials_left(search) for search in self._searches.values())
        confirm, runs = self._spec.confirming, 0
        if not self._confirmed and confirm is not None:
            runs = confirm.seeds * confirm.top_k * len(self._searches)
        return len(self._under_way) + len(self._queue) + tuned + runs

    def _tuned(self) -> Proposal | None:
        """Return the next point of the arm whose turn it is."""
        for _ in range(len(self._turn)):
            search = self._searches[self._turn[0]]
            self._turn.rotate(-1)
            if (asked := search.ask()) is not None:
                number, point = asked
                proposal = self._proposal(search.arm, "tune", number, point, search.arm.base.data.seed)
                search.told[number].point = dict(proposal.point)  # of an attempt that was told other things by then
                return proposal
        return None

    def _confirming(self) -> Proposal | None:
        """Once all tuning has ended, queue the best points of each arm over seeds of their own."""
        if self._confirmed or any(search.budget.running for search in self._searches.values()):
            return None
        self._confirmed = True
        confirm = self._spec.confirming
        for search in self._searches.values() if confirm else ():
            assert confirm is not None
            seeds, best = seeds_of(search.arm, confirm), self._best(search.arm.name)
            if confirm.studies:
                firsts = {found.study: found for found in reversed(best)}
                runs = [(found, seeds[study]) for study, found in sorted(firsts.items())]
            else:
                runs = [(found, seed) for found in best[: confirm.top_k] for seed in seeds]
            self._queue += [self._proposal(search.arm, "confirm", of.number, of.point, seed) for of, seed in runs]
        return self._queue.popleft() if self._queue else None

    def _best(self, arm: str) -> list[Proposal]:
        """Return what has finished of an arm's tuning, best first."""
        sign = 1.0 if self._spec.objective.goal == "min" else -1.0
        finished = [
            (sign * value, proposal.number, proposal)
            for proposal, outcome, value in self._done
            if (proposal.arm, proposal.phase, outcome) == (arm, "tune", "finished") and value is not None
        ]
        return [proposal for _, _, proposal in sorted(finished, key=lambda entry: entry[:2])]

    def _proposal(self, arm: Arm, phase: TrialPhase, number: int, point: Mapping[str, Any], seed: int) -> Proposal:
        name = {
            "tune": f"{arm.name}-{number:04d}",
            "defaults": f"{arm.name}-defaults",
            "confirm": f"{arm.name}-{number:04d}-seed{seed}",
        }[phase]
        known = self._known.get(name)
        return Proposal(
            trial=name,
            arm=arm.name,
            phase=phase,
            number=number,
            point=dict(known.point) if known else dict(point),
            seed=seed,
            study=number % self._spec.num_studies,
            known=known,
        )


def seeds_of(arm: Arm, confirm: ConfirmSpec) -> tuple[int, ...]:
    """Return the seeds that an arm's best is confirmed with; its tuning sees none of them."""
    first = arm.base.data.seed + SEED_STEP
    return tuple(range(first, first + confirm.seeds))


def _search(arm: Arm, spec: SweepSpec) -> Search:
    aim = spec.objective
    return Search(arm=arm, spec=spec.search, budget=budget_of(spec), goal=aim.goal, every=aim.every)


def _trials_left(search: Search) -> float:
    """Return how many trials an arm may still begin, as far as that is known."""
    budget = search.budget
    if search.exhausted:
        return 0
    each = {"trials": 1.0, "steps": float(budget.most_steps)}.get(budget.unit)
    return math.inf if each is None else max(0, math.ceil(budget.left() / each))
