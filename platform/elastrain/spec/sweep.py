"""The spec of a sweep: a base run, what varies in it, how long to look, and what counts as better."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from elastrain.spec.train import Float, Model, NonNegativeInt, PositiveFloat, PositiveInt, WholeNumber, wrong

RANGES = ("uniform", "log", "int", "int_log", "one_minus_log")
LISTS = ("choice", "grid")
KINDS = (*RANGES, "normal", *LISTS)
_VARIES = "each a value, or how it varies: {log: [0.001, 0.1]}, {choice: [64, 256]}, …"


class Dimension(Model):
    """How one field varies: exactly one of the kinds, each [low, high] but normal, and choice and grid, which list."""

    uniform: tuple[Float, Float] | None = Field(default=None, description="evenly between two numbers")
    log: tuple[PositiveFloat, PositiveFloat] | None = Field(default=None, description="evenly in the logarithm")
    int: tuple[WholeNumber, WholeNumber] | None = Field(default=None, description="whole numbers, both ends included")
    int_log: tuple[PositiveInt, PositiveInt] | None = Field(
        default=None, description="whole numbers, both ends included, evenly in the logarithm"
    )
    normal: tuple[Float, PositiveFloat] | None = Field(
        default=None, description="mean and standard deviation, of which up to three either way"
    )
    one_minus_log: tuple[PositiveFloat, PositiveFloat] | None = Field(
        default=None, description="1 - x lies evenly in the logarithm between these, as for momentum: [0.005, 0.3]"
    )
    choice: tuple[Any, ...] | None = Field(default=None, description="one of these values")
    grid: tuple[Any, ...] | None = Field(default=None, description="each of these values; for search.method grid")
    when: dict[str, Any] = Field(
        default={}, description="only where other fields have this value, or one of these: {optimizer.name: [adam]}"
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        kinds = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(kinds) != 1:
            raise wrong(f"give exactly one of {', '.join(KINDS)}, got {', '.join(kinds) or 'none'}", *kinds)
        kind, values = kinds[0], getattr(self, kinds[0])
        if kind in RANGES and values[0] >= values[1]:
            low, high = values
            empty = f"{kind} [{low:g}, {high:g}] is an empty range: the first number must be smaller than the second"
            raise wrong(empty, kind)
        if kind in LISTS and not values:
            raise wrong(f"{kind} lists no value; give one at least", kind)
        if kind in LISTS and any(_same(one, other) for at, one in enumerate(values) for other in values[:at]):
            raise wrong(f"{kind} lists a value twice; each is as likely as every other", kind)
        return self

    @property
    def kind(self) -> str:
        """The kind that is given: one of `KINDS`."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def values(self) -> tuple[Any, ...]:
        """What the kind was given: two numbers, or the values of choice and grid."""
        found: tuple[Any, ...] = getattr(self, self.kind)
        return found


def _same(one: Any, other: Any) -> bool:
    """Say whether two values are one: 1 and true are not, though Python has them equal."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


class ObjectiveSpec(Model):
    """What is compared: a metric of the evaluation, at the same steps in all trials."""

    metric: str = Field(default="val_loss", description="val_loss or a metric that the task names")
    goal: Literal["min", "max"] = Field(default="min", description="whether small or large is good")
    every: PositiveInt = Field(description="steps between evaluations")
    max_steps: PositiveInt = Field(description="steps of a whole trial; the schedule spans them")
    target: Float | None = Field(default=None, description="the value whose first reaching is timed")

    @model_validator(mode="after")
    def _evaluated(self) -> Self:
        if self.every > self.max_steps:
            raise wrong(f"every {self.every} is more than max_steps {self.max_steps}", "every", "max_steps")
        return self


class ArmSpec(Model):
    """One optimizer of a fair comparison and what is tuned of it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")] = Field(
        description="what it is called: up to 64 letters, digits, dashes and underscores"
    )
    baseline: bool = Field(default=False, description="the arm that the others are compared with; else the first")
    optimizer: dict[str, Any] = Field(
        description=f"the whole optimizer, in place of the base's: name and settings, {_VARIES}"
    )
    space: dict[str, Any] | Literal["default"] = Field(
        default={}, description=f"other fields of the run, {_VARIES}; default: the optimizer's published space"
    )


class SearchSpec(Model):
    """Which points are tried."""

    method: Literal["grid", "random", "quasirandom", "tpe", "gp", "pbt"] = Field(
        default="quasirandom", description="how points are chosen"
    )
    seed: NonNegativeInt = Field(default=0, description="decides the points")


class SweepBudget(Model):
    """How much is spent on each arm; mode search has one arm."""

    unit: Literal["trials", "steps", "device_seconds"] = Field(default="trials", description="what is counted")
    per_arm: PositiveFloat = Field(description="how many of them")

    @model_validator(mode="after")
    def _countable(self) -> Self:
        if self.unit != "device_seconds" and self.per_arm != int(self.per_arm):
            raise wrong(f"per_arm {self.per_arm:g}: {self.unit} are counted in whole numbers", "per_arm")
        return self


class EarlyStopSpec(Model):
    """When a trial that is worse than others of its arm ends early."""

    method: Literal["asha", "median", "hyperband"] = Field(description="the rule")
    grace: PositiveInt = Field(description="steps that every trial gets")
    factor: Annotated[int, Field(ge=2)] = Field(default=3, description="asha, hyperband: one in so many goes on")


class ConfirmSpec(Model):
    """What is run again over several seeds, to the end."""

    seeds: PositiveInt = Field(default=5, description="runs of each, with seeds that differ from the tuning's")
    top_k: PositiveInt = Field(default=1, description="how many of an arm's best points")
    studies: bool = Field(
        default=False, description="mode fair: each seed has a share of the points, tuned apart, and confirms its best"
    )


class SweepSpec(Model):
    """A sweep: what `elastrain sweep` takes, as YAML or as this object."""

    kind: Literal["sweep"] = Field(default="sweep", description="what the file holds: a sweep")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")] = Field(
        description="up to 128 letters, digits, dots, dashes and underscores; the sweep lives in <storage>/<name>"
    )
    base: Annotated[str, Field(min_length=1)] = Field(
        description="the spec of the run that is varied, relative to this file"
    )
    set: dict[str, Any] = Field(default={}, description="fields of it that are changed in all trials")
    mode: Literal["search", "fair"] = Field(default="search", description="the best settings, or the better optimizer")
    storage: str = Field(default="runs", description="folder, relative to the working folder, or URL for sweeps")
    objective: ObjectiveSpec = Field(description="what is compared")
    space: dict[str, Any] = Field(default={}, description=f"fields of the run, {_VARIES}")
    arms: tuple[ArmSpec, ...] = Field(default=(), description="mode fair: the optimizers to compare")
    search: SearchSpec = Field(default=SearchSpec(), description="which points are tried")
    budget: SweepBudget = Field(description="how much is spent")
    early_stop: EarlyStopSpec | None = Field(default=None, description="end bad trials early; never where unset")
    confirm: ConfirmSpec | None = Field(default=None, description="run the best again over several seeds")
    max_concurrent: PositiveInt | None = Field(default=None, description="most trials at once; all that fit if unset")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.mode == "search" and self.arms:
            raise wrong("mode search has no arms; write mode: fair to compare optimizers", "arms", "mode")
        if self.mode == "search" and not self.space:
            raise wrong("mode search needs a space: nothing varies without", "space", "mode")
        if self.mode == "fair" and len(self.arms) < 2:
            raise wrong("mode fair compares two arms at least; give arms, or write mode: search", "arms", "mode")
        return self

    @model_validator(mode="after")
    def _told_apart(self) -> Self:
        names = [arm.name for arm in self.arms]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise wrong(f"two arms are called {twice!r}", "arms")
        if sum(arm.baseline for arm in self.arms) > 1:
            raise wrong("two arms are the baseline; the others are compared with one", "arms")
        return self

    @model_validator(mode="after")
    def _affordable(self) -> Self:
        if self.early_stop and self.early_stop.grace >= self.objective.max_steps:
            steps = self.objective.max_steps
            raise wrong(
                f"early_stop.grace {self.early_stop.grace} of max_steps {steps} stops no trial; lower it",
                "early_stop.grace",
                "objective.max_steps",
            )
        if self.search.method == "pbt" and (self.early_stop or self.budget.unit != "trials"):
            raise wrong(
                "search.method pbt is its own early stopping, and its budget is the population: "
                "leave early_stop out and count trials",
                "search.method",
            )
        if self.confirm and self.budget.unit == "trials" and self.confirm.top_k > self.budget.per_arm:
            text = f"confirm.top_k {self.confirm.top_k} is more than the {self.budget.per_arm:g} trials of an arm"
            raise wrong(text, "confirm.top_k", "budget.per_arm")
        return self

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if self.num_studies == 1:
            return self
        if self.mode != "fair" or self.search.method not in ("random", "quasirandom"):
            text = "confirm.studies needs mode fair and points that do not depend on others: quasirandom or random"
            raise wrong(text, "confirm.studies", "search.method")
        if self.confirm and self.confirm.top_k > 1:
            raise wrong("confirm.studies confirms the best point of each; leave top_k out", "confirm.top_k")
        if self.budget.unit == "trials" and self.budget.per_arm < 2 * self.num_studies:
            text = f"budget.per_arm {self.budget.per_arm:g} leaves {self.num_studies} studies less than two points each"
            raise wrong(text, "budget.per_arm", "confirm.seeds")
        return self

    @property
    def confirming(self) -> ConfirmSpec | None:
        """What is confirmed; a comparison does in any case."""
        return self.confirm or (ConfirmSpec() if self.mode == "fair" else None)

    @property
    def num_studies(self) -> int:
        """Into how many studies an arm's points fall, by turns; 1 where they are tuned together."""
        return self.confirm.seeds if self.confirm and self.confirm.studies else 1
