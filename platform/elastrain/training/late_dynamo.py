"""torch._dynamo, loaded when something is compiled: it costs a worker 1.6 s of a core at its start.

torch's optimizers import it at their first use (torch 2.13: `torch._compile`, `torch.optim.optimizer`) for two
functions that do nothing unless something is being compiled. Here these two are there from the start, and whatever else
is asked of the module loads it whole, in its place.
"""

import importlib.util
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import torch

T = TypeVar("T")
NAME = "torch._dynamo"


def defer_dynamo() -> None:
    """Put off loading torch._dynamo in this process, unless it is loaded already."""
    spec = importlib.util.find_spec(NAME)
    if NAME in sys.modules or spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    module.__dict__.update(disable=_disable, graph_break=_graph_break, _late=threading.RLock())
    del module.__path__  # what imports a submodule asks for it, and so loads the module first
    module.__class__ = _Late
    sys.modules[NAME] = module
    setattr(torch, "_dynamo", module)  # noqa: B010 -- as an import would have done; the name is torch's own affair


def _disable(fn: Callable[..., T], recursive: bool = True, **_: Any) -> Callable[..., T]:  # noqa: ARG001, FBT001, FBT002 -- torch's signature
    """Return a function as it is: nothing is being compiled that it could be kept out of."""
    return fn


def _graph_break(msg: str = "") -> None:
    """Do nothing: there is no graph."""


class _Late(ModuleType):
    """A module that is executed when an attribute is missing, once, whatever thread asks."""

    def __getattr__(self, name: str) -> Any:
        held = self.__dict__
        with held.get("_late") or threading.RLock():
            if "__path__" not in held:
                spec = self.__spec__
                assert spec is not None
                assert spec.loader is not None
                self.__path__ = list(spec.submodule_search_locations or ())
                spec.loader.exec_module(self)
        if name in held:
            return held[name]
        raise AttributeError(f"module {NAME!r} has no attribute {name!r}")
