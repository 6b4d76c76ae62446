"""Which points of an arm are tried: asked for one by one, told what came of them. No Ray, no clock, no state on disk.

A point is a pure function of the arm, the seed, its number and, for tpe and gp, what was told before; so a sweep that
was killed goes on with the same points once the trials of its ledger are told again.
"""

import itertools
import random
from dataclasses import dataclass, field

from elastrain.errors import SpecError
from elastrain.spec.sweep import SearchSpec, SweepSpec
from elastrain.sweeps.models import MODELS, Told, check_installed, suggest
from elastrain.sweeps.sobol import MOST_DIMENSIONS, Sobol
from elastrain.sweeps.space import Arm, Point, decode, draw, mutable
from elastrain.sweeps.trials import Outcome

FRUITLESS = 20  # trials of an arm in a row without an evaluation: the fault lies in what they share


@dataclass(kw_only=True, slots=True)
class Budget:
    """What an arm may spend in `unit`, and has: `used` by trials that ended, `running` trials beside them.

    A trial is charged with `least_steps` at least, or a budget of steps would pay for any number that fail at once.
    """

    unit: str
    per_arm: float
    most_steps: int
    least_steps: int = 0
    used: float = 0.0
    running: int = 0
    ended: int = 0

    def begin(self) -> None:
        """Note that a trial begins."""
        self.running += 1

    def spent(self, steps: int, device_s: float) -> None:
        """Note that a trial ended after `steps` and `device_s` of its own in all."""
        self.running -= 1
        self.ended += 1
        self.used += {"trials": 1, "steps": max(steps, self.least_steps), "device_seconds": device_s}[self.unit]

    def left(self) -> float:
        """Return what a further trial may count on: running trials count with all that they may still take.

        In device seconds they count with the mean of those that ended: an arm may overrun by what a trial takes.
        """
        each = {"trials": 1.0, "steps": float(self.most_steps), "device_seconds": self.used / max(1, self.ended)}
        return self.per_arm - self.used - self.running * each[self.unit]

    @property
    def exhausted(self) -> bool:
        """Whether nothing is left even if the running trials took nothing more."""
        return self.used >= self.per_arm or (self.unit == "trials" and self.left() <= 0)


def budget_of(spec: SweepSpec) -> Budget:
    """Return the budget of one arm of a sweep."""
    steps = {"most_steps": spec.objective.max_steps, "least_steps": spec.objective.every}
    return Budget(unit=spec.budget.unit, per_arm=spec.budget.per_arm, **steps)


@dataclass(kw_only=True)
class Search:
    """The search in one arm. `ask` gives points within the budget, `tell` takes what came of each, in any order."""

    arm: Arm
    spec: SearchSpec
    budget: Budget
    goal: str = "min"
    every: int = 1  # steps between evaluations
    told: dict[int, Told] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._fruitless = 0
        check_installed(self.spec.method)
        self._grid = list(grid(self.arm)) if self.spec.method == "grid" else []
        if self.spec.method in ("quasirandom", "pbt"):
            self._sobol = sobol_of(self.arm, self.spec.seed)
        if self.spec.method == "pbt":
            mutable(self.arm)

    def ask(self) -> tuple[int, Point] | None:
        """Return the next number and point; None where the budget has no room now: see `exhausted`."""
        number = max(self.told, default=-1) + 1
        if self.budget.left() <= 0 or self.gave_up or self._out_of_grid(number):
            return None
        point = self._point(number)
        self.told[number] = Told(number=number, point=point)
        self.budget.begin()
        return number, dict(point)

    def tell(self, number: int, value: float | None, outcome: Outcome, *, step: int = 0) -> None:
        """Take what came of a trial: `value` of the objective at its last evaluation at `step`, and how it ended.

        A trial without a value failed, whatever ended it: models learn nothing from it. The budget is told apart.
        """
        entry = self.told[number]
        entry.value, entry.outcome, entry.step = value, outcome, step
        self._fruitless = self._fruitless + 1 if outcome in ("failed", "diverged") and step < self.every else 0

    @property
    def exhausted(self) -> bool:
        """Whether `ask` gives nothing any more, whatever the running trials still leave of the budget."""
        return self.budget.exhausted or self.gave_up or self._out_of_grid(max(self.told, default=-1) + 1)

    @property
    def gave_up(self) -> bool:
        """Whether the last `FRUITLESS` trials had no evaluation, where nothing else bounds how many there may be."""
        bounded = self.budget.unit == "trials" or self.spec.method == "grid"
        return not bounded and self._fruitless >= FRUITLESS

    def _out_of_grid(self, number: int) -> bool:
        return self.spec.method == "grid" and number >= len(self._grid)

    def _point(self, number: int) -> Point:
        match self.spec.method:
            case "grid":
                return self._grid[number]
            case "random":
                chance = random.Random(f"{self.spec.seed}/{number}")  # noqa: S311 -- points, no secrets
                return decode(self.arm, [chance.random() for _ in self.arm.dimensions])
            case "quasirandom" | "pbt":
                return decode(self.arm, self._sobol.point(number))
        return suggest(self.arm, self.spec, self.told.values(), number, goal=self.goal)


def first_points(arm: Arm, spec: SearchSpec, count: int) -> list[Point]:
    """Return the first `count` points, or all of a smaller grid; at random those of a model, which knows nothing yet.

    Raises SpecError as `Search` does.
    """
    method = "random" if spec.method in MODELS else spec.method
    shown = Search(
        arm=arm,
        spec=spec.model_copy(update={"method": method}),
        budget=Budget(unit="trials", per_arm=count, most_steps=1),
    )
    return [asked[1] for asked in iter(shown.ask, None)]


def grid(arm: Arm) -> list[Point]:
    """Return all points of an arm whose dimensions are lists, each once, the last field varying fastest."""
    found: list[Point] = []
    for values in itertools.product(*(each.values for each in arm.dimensions.values())):
        chosen = dict(zip(arm.dimensions, values, strict=True))
        point = draw(arm, lambda path, _: chosen[path])  # noqa: B023 -- called at once
        if point not in found:
            found.append(point)
    return found


def sobol_of(arm: Arm, seed: int) -> Sobol:
    """Return the sequence of an arm's points: arms share it, as far as their dimensions go, so their luck is equal.

    Raises:
        SpecError: The arm has more dimensions than the sequence.
    """
    count = len(arm.dimensions)
    if count > MOST_DIMENSIONS:
        text = f"arm {arm.name}: {count} fields vary, and quasirandom points have {MOST_DIMENSIONS} dimensions at most"
        raise SpecError(f"{text}; fix some, or search.method: random")
    return Sobol(count, seed=seed)
