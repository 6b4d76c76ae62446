"""What a user writes: a Task builds a model and says what its losses and metrics are on a batch."""

import traceback
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from elastrain.data.transforms import load_object
from elastrain.errors import DataError, ElastrainError, SpecError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from elastrain.data.columns import Column
    from elastrain.data.dataset import Dataset
    from elastrain.spec.train import TrainSpec


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss as a sum over samples (or tokens) and the weight it was summed over: exact under any split.

    `sum` is a scalar tensor with a gradient, `weight` a number or a scalar tensor without one.
    """

    sum: Tensor
    weight: "Tensor | float"


@dataclass(frozen=True, slots=True)
class Ratio:
    """A metric as numerator and denominator (numbers or scalar tensors), both sums over samples."""

    numerator: "Tensor | float"
    denominator: "Tensor | float"


class Batch(dict[str, Tensor]):
    """The columns of a micro-batch: tensors of shape (rows, *shape). A missing column is a DataError."""

    def __missing__(self, name: str) -> Tensor:
        there = ", ".join(sorted(self))
        raise DataError(f"the task asks for column {name!r}, which the data lack; the columns read are {there}")

    def clone(self) -> "Batch":
        """Return the batch with tensors of its own: a task may change in place what it is given."""
        return Batch({name: tensor.clone() for name, tensor in self.items()})


Losses = Mapping[str, "Loss | Callable[[], Loss]"]


class Task:
    """Base of every task. `data.columns` describes what is read, keyword arguments are the spec's `task_args`.

    With one loss its optimizer trains all of the model. With several, each key is a *phase* of a step: phases run in
    the order of `phases`, and phase `p` trains the parameters of the model's child of that name (`model.p`); a loss
    may be a function, called in its phase only.
    """

    phases: ClassVar[tuple[str, ...]] = ("loss",)

    def __init__(self, data: "DataInfo", **args: Any) -> None:
        self.data = data
        self.args = args

    def build(self) -> nn.Module:
        """Return a new model; its weights come from torch's default generator, which the run seeds."""
        raise NotImplementedError

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """Return the loss of each phase on a batch."""
        raise NotImplementedError

    def metrics(self, model: nn.Module, batch: Batch) -> Mapping[str, Ratio]:
        """Return what evaluation reports besides the loss; nothing by default."""
        del model, batch
        return {}


@dataclass(frozen=True, slots=True)
class DataInfo:
    """What a task may know of the data: the columns by name, and the number of training samples."""

    columns: Mapping[str, "Column"]
    num_rows: int

    @classmethod
    def of(cls, dataset: "Dataset") -> "DataInfo":
        """Return what a task may know of a dataset."""
        return cls(columns=_Columns({column.name: column for column in dataset.columns}), num_rows=dataset.num_rows)

    def shape(self, column: str) -> tuple[int, ...]:
        """Return the shape of one row of a column; raises DataError if the data lack it."""
        return self.columns[column].shape

    def num_values(self, column: str) -> int:
        """Return how many values an integer column takes (classes, vocabulary); raises DataError if unknown."""
        known = self.columns[column].num_values
        if known is None:
            raise DataError(
                f"column {column!r}: the number of its values is unknown; pack the data, or set it in task_args"
            )
        return known


class _Columns(dict[str, "Column"]):
    def __missing__(self, name: str) -> "Column":
        there = ", ".join(self) or "none"
        raise DataError(f"the task asks for column {name!r}, which the data lack; the columns are {there}")


def task_class(name: str) -> type[Task]:
    """Return the class that `file.py:Class` or `module:Class` names; raises SpecError if it is no Task."""
    with calling(name, "importing it"):
        found = load_object(name, where=f"task {name}")
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise SpecError(f"task {name}: not a class derived from elastrain.Task")
    return found


def make_task(spec: "TrainSpec", dataset: "Dataset") -> Task:
    """Return the spec's task on this data; raises SpecError for arguments it does not take, DataError for columns."""
    kind = task_class(spec.task)
    with calling(spec.task, f"making it with task_args {dict(spec.task_args)}"):
        task = kind(DataInfo.of(dataset), **spec.task_args)
    if len(set(task.phases)) != len(task.phases) or not task.phases:
        raise SpecError(f"task {spec.task}: phases must be different names, at least one; got {task.phases}")
    return task


def phase_loss(task: Task, model: nn.Module, batch: Batch, phase: str) -> Loss:
    """Return one phase's loss; raises SpecError if the task does not give it as the interface says."""
    losses = task.losses(model, batch)
    if losses.keys() != set(task.phases):
        raise SpecError(f"losses() gave {sorted(losses)}, but the task's phases are {sorted(task.phases)}")
    entry = losses[phase]
    loss: object = entry() if callable(entry) else entry
    if not isinstance(loss, Loss) or not _is_scalar(loss.sum):
        raise SpecError(f"losses(): {phase!r} must be a Loss(sum, weight) whose sum is a scalar tensor")
    weight = loss.weight
    if not _is_number(weight) or (isinstance(weight, Tensor) and weight.requires_grad):
        raise SpecError(
            f"losses(): the weight of {phase!r} must be a number or a scalar tensor without a gradient: over how many "
            f"samples or tokens its sum goes; got {_described(weight)}"
        )
    return loss


def metric_ratios(task: Task, model: nn.Module, batch: Batch) -> Mapping[str, Ratio]:
    """Return the task's metrics on a batch; raises SpecError if the task does not give them as the interface says."""
    metrics: object = task.metrics(model, batch)
    if not isinstance(metrics, Mapping):
        raise SpecError(f"metrics() must return a dict of Ratio(numerator, denominator), not {_described(metrics)}")
    for name, ratio in metrics.items():
        if not isinstance(name, str) or not isinstance(ratio, Ratio):
            raise SpecError(
                f"metrics(): {name!r} must be text that names a Ratio(numerator, denominator), not {_described(ratio)}"
            )
        for value in (ratio.numerator, ratio.denominator):
            if not _is_number(value):
                raise SpecError(
                    f"metrics(): {name!r} must be a Ratio of numbers or scalar tensors, sums over samples; got "
                    f"{_described(value)}"
                )
    return metrics


def _is_scalar(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0


def _is_number(value: object) -> bool:
    return _is_scalar(value) or isinstance(value, Real)


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"a tensor of shape {tuple(value.shape)}{' with a gradient' if value.requires_grad else ''}"


def phase_parameters(task: Task, model: nn.Module, phase: str) -> list[tuple[str, nn.Parameter]]:
    """Return the named parameters that a phase trains, in the model's order; raises SpecError if there are none."""
    prefix = "" if len(task.phases) == 1 else f"{phase}."
    named = [(name, p) for name, p in model.named_parameters() if name.startswith(prefix) and p.requires_grad]
    if not named:
        child = f"no child {phase!r} with parameters" if prefix else "no parameters that need a gradient"
        raise SpecError(f"the task's model has {child}: phase {phase!r} would train nothing")
    return named


def check_phases(task: Task, model: nn.Module) -> None:
    """Raise SpecError if a parameter would be trained by no phase."""
    if len(task.phases) == 1:
        return
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.startswith(tuple(f"{phase}." for phase in task.phases)):
            raise SpecError(
                f"the task's parameter {name} belongs to none of the phases {', '.join(task.phases)} and would not be "
                f"trained; move it into the child of a phase, or freeze it with requires_grad_(False)"
            )


@contextmanager
def calling(name: str, what: str) -> "Iterator[None]":
    """Turn an error inside the user's code into a SpecError that carries the user's own traceback."""
    try:
        yield
    except (ElastrainError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        frames = [
            frame for frame in traceback.extract_tb(error.__traceback__) if "elastrain/training" not in frame.filename
        ]
        lines = "".join(traceback.format_list(frames[-6:]))
        raise SpecError(f"task {name}: {what} raised {type(error).__name__}: {error}\n{lines}".rstrip()) from error
