"""A sweep's spec and its base in a folder, for tests that need no run."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.sweeps.texts import BASE

from elastrain.spec.sweep import SweepSpec
from elastrain.sweeps.document import base_of, read_sweep
from elastrain.sweeps.space import Arm, arms_of

Read = Callable[..., SweepSpec]
Arms = Callable[..., list[Arm]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Return a function from a sweep's text and overrides to its spec; base and task lie beside it."""
    (tmp_path / "task.py").write_text("class Task: ...\n")
    (tmp_path / "train.yaml").write_text(BASE)

    def reads(text: str, *sets: str) -> SweepSpec:
        (tmp_path / "sweep.yaml").write_text(text)
        return read_sweep(tmp_path / "sweep.yaml", sets)

    return reads


@pytest.fixture
def arms(read: Read) -> Arms:
    """Return a function from a sweep's text and overrides to its arms."""

    def found(text: str, *sets: str) -> list[Arm]:
        spec = read(text, *sets)
        return arms_of(spec, base_of(spec))

    return found
