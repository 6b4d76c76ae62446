"""The spec of one training run. Frozen pydantic models; units and ranges stand at the fields.

Nothing here opens a file, imports torch or knows Ray.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError, PydanticKnownError

from elastrain.keys import KEY_NAMES, named
from elastrain.spec.accelerators import GPUS
from elastrain.spec.problems import nearest

# Names of the spec, and what is published for them where that differs from the fields' defaults.
PUBLISHED: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum": {},
    "nesterov": {},
    "full_batch": {},
    "adam": {},
    "adamw": {},
    "nadam": {},
    "radam": {},
    "adagrad": {"eps": 1e-10},
    "rmsprop": {"momentum": 0.0},
    "adafactor": {},
    "lion": {"betas": (0.9, 0.99)},
    "muon": {"momentum": 0.95, "betas": (0.9, 0.95), "eps": 1e-10},
    "shampoo": {"eps": 1e-6},
    "soap": {"betas": (0.95, 0.95)},
    "schedule_free_sgd": {},
    "schedule_free_adamw": {},
}
OPTIMIZERS = tuple(PUBLISHED)
RULE_FIELDS = ("momentum", "betas", "eps")  # fields whose default is the optimizer's own


def _not_a_bool(value: Any) -> Any:
    """Refuse true and false where a number stands: Python would take `clip_norm: true` for 1.0."""
    if isinstance(value, bool):
        raise PydanticKnownError("float_type")
    return value


_Number = BeforeValidator(_not_a_bool)
WholeNumber = Annotated[int, _Number]
PositiveInt = Annotated[int, Field(gt=0), _Number]
NonNegativeInt = Annotated[int, Field(ge=0), _Number]
Float = Annotated[float, _Number]
PositiveFloat = Annotated[float, Field(gt=0.0), _Number]
NonNegativeFloat = Annotated[float, Field(ge=0.0), _Number]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0), _Number]
Share = Annotated[float, Field(ge=0.0, le=1.0), _Number]


def wrong(text: str, *fields: str) -> PydanticCustomError:
    """Return the error of a rule over several `fields` (relative to the model), by which YAML finds the line."""
    return PydanticCustomError("wrong", "{text}", {"text": text, "fields": fields})


class Model(BaseModel):
    """Base of every spec: frozen; an unknown key is an error, and so is a number that is infinite or not a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Scale(Model):
    """`x * factor + offset` in float32; 1/255 brings bytes to 0..1."""

    name: Literal["scale"] = Field(description="scale: x * factor + offset in float32")
    column: str = Field(description="the column to scale")
    factor: Float = Field(default=1.0 / 255.0, description="multiplies the values; 1/255 brings bytes to 0..1")
    offset: Float = Field(default=0.0, description="what is added after the factor")


class Standardise(Model):
    """`(x - mean) / std` in float32 with the statistics that `pack` stored for the column."""

    name: Literal["standardise"] = Field(description="standardise: (x - mean) / std, with what pack measured")
    column: str = Field(description="the column to standardise")


class Flip(Model):
    """Mirror images (height, width[, channels]) left to right with probability `p`; training only."""

    name: Literal["flip"] = Field(description="flip: mirror images left to right; training only")
    column: str = Field(description="the column that holds the images")
    p: Share = Field(default=0.5, description="probability, 0 to 1")


class Shift(Model):
    """Move images (height, width[, channels]) by up to `pixels` each way, zeros coming in; training only."""

    name: Literal["shift"] = Field(description="shift: move images, zeros coming in; training only")
    column: str = Field(description="the column that holds the images")
    pixels: PositiveInt = Field(default=2, description="the farthest move each way, in pixels")


class Custom(Model):
    """A function `f(columns, seeds) -> columns` over arrays of rows; `seeds` holds one uint64 a row."""

    name: Literal["custom"] = Field(description="custom: a function of your own over arrays of rows")
    function: str = Field(description="file.py:function, relative to the spec's file, or module:function")
    train_only: bool = Field(default=False, description="leave evaluation alone")


Transform = Annotated[Scale | Standardise | Flip | Shift | Custom, Field(discriminator="name")]


def _bytes(value: Any) -> Any:
    """Read `100GB` or `1.5 GiB` as a number of bytes."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) ?([KMGT]i?)?B", value) if isinstance(value, str) else None
    if found is None:
        return value
    prefix = found[2] or ""
    return int(float(found[1]) * (1024 if prefix.endswith("i") else 1000) ** " KMGT".index(prefix[:1] or " "))


class CacheSpec(Model):
    """Where each node keeps what it reads from remote storage; data in local folders are read where they are."""

    folder: Annotated[str, Field(min_length=1)] = Field(
        description="a folder on each node's own disk, relative to the working folder; runs may share it"
    )
    max_bytes: Annotated[int, Field(gt=0), _Number, BeforeValidator(_bytes)] = Field(
        description="bytes that it holds at most on a node, as a number or as in 100GB",
        json_schema_extra={"type": ["integer", "string"]},
    )

    @model_validator(mode="after")
    def _local(self) -> Self:
        if "://" in self.folder:
            raise wrong(f"folder {self.folder!r} is a URL; the cache is a folder on each node's own disk", "folder")
        return self


class DataSpec(Model):
    """What is read, in what batches, in what order."""

    train: str = Field(description="dataset to train on: a folder, relative to the working folder, a URL or a table")
    eval: str | None = Field(default=None, description="dataset to evaluate on: a folder or a URL; none where unset")
    global_batch: PositiveInt | Literal["all"] = Field(description="samples in one step over all workers, or all")
    slots: PositiveInt | None = Field(default=None, description="logical workers; workers.max where unset")
    seed: NonNegativeInt = Field(default=0, description="decides the order of the data and all randomness")
    columns: tuple[str, ...] | None = Field(default=None, description="columns to read; all where unset")
    on_bad_shard: Literal["error", "quarantine"] = Field(
        default="error", description="a shard that cannot be read ends the run, or is left out after all are read once"
    )
    transforms: tuple[Transform, ...] = Field(default=(), description="what is done to a batch's columns, in order")
    cache: CacheSpec | None = Field(default=None, description="keep remote data on each node's disk; not where unset")


class OptimizerSpec(Model):
    """The update rule. `args` goes as it is to the class; `phases` overrides settings for single phases.

    `momentum`, `betas` and `eps` are those published for the name where they are not set (`PUBLISHED`).
    """

    name: str = Field(description=f"{', '.join(OPTIMIZERS)}, file.py:Class or module:Class")
    lr: PositiveFloat = Field(description="learning rate, before the schedule's factor")
    weight_decay: NonNegativeFloat = Field(default=0.0, description="decay of the weights")
    no_decay: tuple[Literal["norms", "biases", "embeddings"], ...] = Field(
        default=(), description="kinds of parameters without decay; all decay where unset"
    )
    momentum: Fraction = Field(default=0.9, description="share of the last update kept, by those that keep one")
    betas: tuple[Fraction, Fraction] = Field(
        default=(0.9, 0.999), description="decay of both moments: adam and its kin"
    )
    eps: PositiveFloat = Field(default=1e-8, description="added to the divisor: adam and its kin")
    args: dict[str, Any] = Field(default={}, description="goes as it is to the optimizer's class")
    phases: dict[str, dict[str, Any]] = Field(default={}, description="settings that differ in a phase, by its name")

    @model_validator(mode="before")
    @classmethod
    def _published(cls, data: Any) -> Any:
        """Put in what is published for the name, so that a stored spec says it and a later default changes no run."""
        name = data.get("name") if isinstance(data, dict) else None
        return {**PUBLISHED.get(name, {}), **data} if isinstance(name, str) else data

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.name not in OPTIMIZERS and ":" not in self.name:
            known = f"none of {', '.join(OPTIMIZERS)} and not module:Class"
            raise wrong(f"optimizer {self.name!r} is {known}{nearest(self.name, OPTIMIZERS)}", "name")
        return self

    def with_settings(self, own: dict[str, Any]) -> "OptimizerSpec":
        """Return the spec with some settings of its own; another `name` brings what is published for it along.

        Raises ValueError if they are wrong.
        """
        mine = self.model_dump(exclude={"phases"})
        if own.get("name", self.name) != self.name:
            fresh = type(self)(name=self.name, lr=self.lr)
            mine = {key: v for key, v in mine.items() if key not in RULE_FIELDS or v != getattr(fresh, key)}
        return type(self).model_validate({**mine, **own})


class ScheduleSpec(Model):
    """The learning rate as a factor of `optimizer.lr`; a pure function of the step."""

    name: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt", "one_cycle"] = Field(
        default="constant", description="how the factor goes from 1 to final after the warm-up"
    )
    warmup_steps: NonNegativeInt = Field(default=0, description="steps over which the factor rises to 1")
    final: Share = Field(default=0.0, description="factor that the decay would reach just after the last step")
    decay: Annotated[float, Field(gt=0.0, le=1.0), _Number] = Field(
        default=0.2, description="wsd: share of the steps that decay"
    )
    shape: Literal["linear", "cosine", "sqrt"] = Field(default="linear", description="wsd: the curve of the decay")


class BudgetSpec(Model):
    """How long: epochs or steps, one of them."""

    epochs: PositiveInt | None = Field(default=None, description="passes over the data; instead of steps")
    steps: PositiveInt | None = Field(default=None, description="optimizer updates; instead of epochs")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise wrong("give exactly one of epochs and steps", "epochs", "steps")
        return self


class EvalSpec(Model):
    """When to evaluate; once at the end in any case."""

    every_steps: PositiveInt | None = Field(default=None, description="steps between evaluations; the end has one")


class CheckpointSpec(Model):
    """When to commit, and what is kept: the newest `keep`, and the best by `best`."""

    every_steps: PositiveInt = Field(default=100, description="steps between checkpoints")
    keep: PositiveInt = Field(default=3, description="how many of the newest are kept")
    best: str | None = Field(default="val_loss", description="the metric whose best checkpoint is kept too")
    goal: Literal["min", "max"] = Field(default="min", description="whether a small or a large `best` is good")
    encrypt: str | None = Field(
        default=None, description="the name of a key to encrypt with: small letters, digits and underscores"
    )

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.encrypt is not None and not named(self.encrypt):
            raise wrong(f"encrypt: {KEY_NAMES}", "encrypt")  # without the value, which may be a key
        return self


class WorkersSpec(Model):
    """How many workers, and what each holds; `cpus` may be a fraction."""

    min: PositiveInt = Field(default=1, description="fewest workers to go on with; below it the run waits")
    max: PositiveInt = Field(default=1, description="most workers that are used")
    cpus: PositiveFloat = Field(default=1.0, description="CPUs of one worker; may be a fraction")
    gpus: NonNegativeFloat = Field(default=0.0, description="GPUs of one worker; a part of one only where max is 1")
    accelerator: str | None = Field(
        default=None, description="the kind of GPU, by Ray's name: H100, A100, …; any where unset"
    )
    timeout_s: PositiveFloat = Field(
        default=60.0, description="seconds that a step may take; who stands still for longer is replaced"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise wrong(f"min {self.min} is more than max {self.max}", "min", "max")
        if 0.0 < self.gpus < 1.0 < self.max:
            raise wrong(f"gpus {self.gpus:g}: workers cannot share a GPU (NCCL refuses it); give each 1", "gpus", "max")
        if self.accelerator is not None and self.accelerator not in GPUS:
            raise wrong(f"Ray knows no GPU {self.accelerator!r}{nearest(self.accelerator, GPUS)}", "accelerator")
        if self.accelerator is not None and not self.gpus:
            raise wrong(f"accelerator {self.accelerator} needs gpus: workers ask for none", "accelerator", "gpus")
        return self

    def needs(self) -> dict[str, float]:
        """Return what one worker holds, by Ray's names; a trace of a kind keeps it on nodes of this kind.

        >>> WorkersSpec(cpus=4, gpus=1, accelerator="H100").needs()
        {'CPU': 4.0, 'GPU': 1.0, 'accelerator_type:H100': 0.001}
        """
        gpus = {"GPU": self.gpus} if self.gpus else {}
        return {
            "CPU": self.cpus,
            **gpus,
            **({f"accelerator_type:{self.accelerator}": 0.001} if self.accelerator else {}),
        }

    def in_words(self) -> str:
        """Return what one worker holds, as in `4 CPUs and 1 GPUs (H100)`."""
        kind = f" ({self.accelerator})" if self.accelerator else ""
        return f"{self.cpus:g} CPUs" + (f" and {self.gpus:g} GPUs{kind}" if self.gpus else "")


class TrainSpec(Model):
    """One training run: what `elastrain train` takes, as YAML or as this object."""

    kind: Literal["train"] = Field(default="train", description="what the file holds: one training run")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")] = Field(
        description="up to 128 letters, digits, dots, dashes and underscores; the run lives in <storage>/<name>"
    )
    task: str = Field(description="file.py:Class, relative to the spec's file, or module:Class")
    task_args: dict[str, Any] = Field(default={}, description="the task's own settings: sizes, dropout, …")
    data: DataSpec = Field(description="what is read, in what batches, in what order")
    optimizer: OptimizerSpec = Field(description="the update rule")
    schedule: ScheduleSpec = Field(default=ScheduleSpec(), description="the learning rate over the steps")
    budget: BudgetSpec = Field(description="how long: epochs or steps")
    eval: EvalSpec = Field(default=EvalSpec(), description="when to evaluate")
    clip_norm: PositiveFloat | None = Field(default=None, description="largest norm of the gradient")
    l1: NonNegativeFloat = Field(default=0.0, description="factor of the weights' absolute values in the loss")
    ema: Annotated[float, Field(gt=0.0, lt=1.0), _Number] | None = Field(
        default=None, description="decay of averaged weights"
    )
    compile: bool = Field(default=False, description="run the model through torch.compile")
    micro_batch: PositiveInt | None = Field(default=None, description="rows in one forward; a slot's where unset")
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = Field(default="fp32", description="type of the arithmetic")
    consistency: Literal["sample", "bitwise"] = Field(
        default="sample", description="what resizing keeps: the samples and their order, or every bit of the weights"
    )
    workers: WorkersSpec = Field(default=WorkersSpec(), description="how many workers, and what each holds")
    checkpoint: CheckpointSpec = Field(default=CheckpointSpec(), description="when to commit, and what is kept")
    audit: bool = Field(default=False, description="record which worker trained on which sample")
    storage: str = Field(default="runs", description="folder, relative to the working folder, or URL for runs")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.optimizer.name == "full_batch" and self.data.global_batch != "all":
            raise wrong("optimizer full_batch needs data.global_batch: all", "data.global_batch", "optimizer.name")
        slots = self.num_slots
        if slots < self.workers.max:
            raise wrong(
                f"data.slots {slots} is less than workers.max {self.workers.max}: a worker needs a slot",
                "data.slots",
                "workers.max",
            )
        return self

    @property
    def num_slots(self) -> int:
        """Logical workers of the run: `data.slots`, or `workers.max` where unset."""
        return self.data.slots if self.data.slots is not None else self.workers.max
