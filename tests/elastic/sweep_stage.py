"""A small sweep over the digits whose trials do as they are told: raise, die, diverge, or wait until a test lets them.

While a file `hold` lies beside the task, trials wait in their 26th step (of two slots), from the trial on whose number
in its process the file holds; the first that waits makes a file `holding`.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from elastrain.sweeps.document import read_sweep

PIPELINE = Path(__file__).parents[2] / "pipelines" / "digits_mlp"
SWEEP = """
kind: sweep
name: {name}
base: {base}
set: {{workers: {{min: 1, max: 1, cpus: 4, timeout_s: 600}}, data.slots: 2, precision: fp32, consistency: bitwise}}
objective: {{metric: val_loss, every: 20, max_steps: 60}}
space: {{optimizer.lr: {{log: [1.0e-4, 1.0e-1]}}}}
budget: {{unit: trials, per_arm: 4}}
"""

TASK = """

import os
import time
from pathlib import Path

HERE = Path(__file__).parent


class Moody(DigitsMLP):
    made = 0  # in this process

    def __init__(self, data, mood="fine", **args):
        super().__init__(data, **args)
        Moody.made += 1
        self.mood, self.calls, self.number = mood, 0, Moody.made

    def losses(self, model, batch):
        self.calls += model.training
        while self.calls > 50 and self.is_held():
            time.sleep(0.02)
        if self.mood == "raises" and self.calls > 10:
            raise KeyError("what is missing")
        if self.mood == "dies" and self.calls > 10:
            os._exit(9)
        found = super().losses(model, batch)
        if self.mood == "diverges" and self.calls > 70:
            found["loss"] = type(found["loss"])(found["loss"].sum * float("nan"), found["loss"].weight)
        return found

    def is_held(self):
        try:
            held = self.number >= int((HERE / "hold").read_text())
        except FileNotFoundError:
            return False
        if held:
            (HERE / "holding").touch()
        return held
"""


class Moods:
    """The sweep's files in a folder, and the hold on its trials."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base = folder, folder / "train.yaml"
        text = (PIPELINE / "train.yaml").read_text()
        self.base.write_text(text.replace("task.py:DigitsMLP", "moody.py:Moody"))
        (folder / "moody.py").write_text((PIPELINE / "task.py").read_text() + TASK)

    def path(self, name: str) -> Path:
        """Write the spec of a sweep of this name."""
        path = self.folder / f"{name}.yaml"
        path.write_text(SWEEP.format(name=name, base=self.base))
        return path

    def read(self, name: str, *changes: str) -> Any:
        """Return the spec of a sweep of this name with changes."""
        return read_sweep(self.path(name), changes)

    def hold(self, number: int = 1) -> None:
        """Have trials wait from this one of their process on."""
        (self.folder / "holding").unlink(missing_ok=True)
        (self.folder / "hold").write_text(str(number))

    def wait(self) -> None:
        """Wait until one waits."""
        wait_for((self.folder / "holding").exists)

    def release(self) -> None:
        """Let all go on."""
        (self.folder / "hold").unlink(missing_ok=True)


def wait_for(what: Callable[[], object], *, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
