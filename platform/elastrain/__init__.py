"""Elastrain: elastic, exact training on Ray. The public names, loaded on first use.

>>> import elastrain
>>> elastrain.SpecError.exit_code
2
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastrain.cluster.jobs import Job as Job
    from elastrain.cluster.jobs import submit as submit
    from elastrain.data.dataset import Dataset as Dataset
    from elastrain.data.plan import Plan as Plan
    from elastrain.elastic.run import Run as Run
    from elastrain.elastic.run import train as train
    from elastrain.errors import ConflictError as ConflictError
    from elastrain.errors import DataError as DataError
    from elastrain.errors import DivergedError as DivergedError
    from elastrain.errors import ElastrainError as ElastrainError
    from elastrain.errors import Interrupted as Interrupted
    from elastrain.errors import ResourceError as ResourceError
    from elastrain.errors import SpecError as SpecError
    from elastrain.errors import StorageError as StorageError
    from elastrain.spec.sweep import SweepSpec as SweepSpec
    from elastrain.spec.train import TrainSpec as TrainSpec
    from elastrain.sweeps.run import Sweep as Sweep
    from elastrain.sweeps.run import sweep as sweep
    from elastrain.training.task import Batch as Batch
    from elastrain.training.task import Loss as Loss
    from elastrain.training.task import Ratio as Ratio
    from elastrain.training.task import Task as Task

_HOME = {
    "Job": "cluster.jobs",
    "submit": "cluster.jobs",
    "Dataset": "data.dataset",
    "Plan": "data.plan",
    "Run": "elastic.run",
    "train": "elastic.run",
    "TrainSpec": "spec.train",
    "SweepSpec": "spec.sweep",
    "Sweep": "sweeps.run",
    "sweep": "sweeps.run",
    "Batch": "training.task",
    "Loss": "training.task",
    "Ratio": "training.task",
    "Task": "training.task",
    "ConflictError": "errors",
    "DataError": "errors",
    "DivergedError": "errors",
    "ElastrainError": "errors",
    "Interrupted": "errors",
    "ResourceError": "errors",
    "SpecError": "errors",
    "StorageError": "errors",
}

__all__ = sorted(_HOME)  # noqa: PLE0605 -- a list of the keys above
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Load a public name from its module."""
    if name not in _HOME:
        raise AttributeError(f"module 'elastrain' has no attribute {name!r}")
    return getattr(import_module(f"elastrain.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
