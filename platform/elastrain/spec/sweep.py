"""The spec of a sweep: a base run, what varies in it, how long to look, and what counts as better."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from elastrain.spec.train import Float, Model, NonNegativeInt, PositiveFloat, PositiveInt, wrong


class Dimension(Model):
    """How one field varies: exactly one of the kinds, each [low, high] but choice and grid, which list values."""

    uniform: tuple[Float, Float] | None = Field(default=None, description="evenly between two numbers")
    log: tuple[PositiveFloat, PositiveFloat] | None = Field(default=None, description="evenly in the logarithm")
    int: tuple[int, int] | None = Field(default=None, description="whole numbers, both ends included")
    int_log: tuple[PositiveInt, PositiveInt] | None = Field(default=None, description="whole numbers, logarithmically")
    normal: tuple[Float, PositiveFloat] | None = Field(default=None, description="mean and standard deviation")
    one_minus_log: tuple[PositiveFloat, PositiveFloat] | None = Field(
        default=None, description="1 - x is evenly distributed in the logarithm, as for momentum: [0.005, 0.3]"
    )
    choice: tuple[Any, ...] | None = Field(default=None, description="one of these values")
    grid: tuple[Any, ...] | None = Field(default=None, description="each of these values")
    when: dict[str, Any] = Field(default={}, description="only where other fields have (one of) these values")


class ObjectiveSpec(Model):
    """What is compared: a metric of the evaluation, at the same steps in all trials."""

    metric: str = Field(default="val_loss", description="val_loss or a metric that the task names")
    goal: Literal["min", "max"] = Field(default="min", description="whether small or large is good")
    every: PositiveInt = Field(description="steps between evaluations")
    max_steps: PositiveInt = Field(description="steps of a whole trial; the schedule spans them")
    target: Float | None = Field(default=None, description="the value whose first reaching is timed")


class ArmSpec(Model):
    """One optimizer of a fair comparison and what is tuned of it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")] = Field(description="what it is called")
    baseline: bool = Field(default=False, description="the arm that the others are compared with")
    optimizer: dict[str, Any] = Field(description="name and settings, each a value or how it varies")
    space: dict[str, Any] = Field(default={}, description="other fields of the run, each a value or how it varies")


class SearchSpec(Model):
    """Which points are tried."""

    method: Literal["grid", "random", "quasirandom", "tpe", "gp", "pbt"] = Field(
        default="quasirandom", description="how points are chosen"
    )
    seed: NonNegativeInt = Field(default=0, description="decides the points")


class SweepBudget(Model):
    """How much is spent on each arm (in mode search: on all)."""

    unit: Literal["trials", "steps", "device_seconds"] = Field(default="trials", description="what is counted")
    per_arm: PositiveFloat = Field(description="how many of them")


class EarlyStopSpec(Model):
    """When a trial that is worse than others ends early."""

    method: Literal["asha", "median", "hyperband"] = Field(description="the rule")
    grace: PositiveInt = Field(description="steps that every trial gets")
    factor: Annotated[int, Field(ge=2)] = Field(default=3, description="asha, hyperband: one in so many goes on")


class ConfirmSpec(Model):
    """What is run again over several seeds, to the end."""

    seeds: PositiveInt = Field(default=5, description="runs of each, with seeds that differ from the tuning's")
    top_k: PositiveInt = Field(default=1, description="how many of an arm's best points")


class SweepSpec(Model):
    """A sweep: what `elastrain sweep` takes."""

    kind: Literal["sweep"] = Field(default="sweep", description="what the file holds: a sweep")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")] = Field(
        description="up to 128 letters, digits, dots, dashes and underscores; the sweep lives in <storage>/<name>"
    )
    base: str = Field(description="the spec of the run that is varied, relative to this file")
    set: dict[str, Any] = Field(default={}, description="fields of it that are changed in all trials")
    mode: Literal["search", "fair"] = Field(default="search", description="the best settings, or the better optimizer")
    storage: str = Field(default="runs", description="folder, relative to the working folder, or URL for sweeps")
    objective: ObjectiveSpec = Field(description="what is compared")
    space: dict[str, Any] = Field(default={}, description="fields of the run, each a value or how it varies")
    arms: tuple[ArmSpec, ...] = Field(default=(), description="mode fair: the optimizers to compare")
    search: SearchSpec = Field(default=SearchSpec(), description="which points are tried")
    budget: SweepBudget = Field(description="how much is spent")
    early_stop: EarlyStopSpec | None = Field(default=None, description="end bad trials early; never where unset")
    confirm: ConfirmSpec | None = Field(default=None, description="run the best again over several seeds")
    max_concurrent: PositiveInt | None = Field(default=None, description="most trials at once; all that fit if unset")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.mode == "fair") != bool(self.arms):
            raise wrong("mode fair needs arms, and mode search has none", "mode", "arms")
        return self
