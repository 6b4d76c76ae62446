"""What a run comes to that nothing disturbs: one worker without Ray, which reads all rows at once; prints the digest.

As a process of its own, as threads and arithmetic are a process's: `python reference.py SPEC CHANGE…`.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from elastrain.spec.train import TrainSpec

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Reference:
    """Training that goes on beside the test."""

    process: "subprocess.Popen[str]"

    def weights_sha256(self) -> str:
        """Wait for it and return the digest."""
        out, errors = self.process.communicate(timeout=300)
        assert self.process.returncode == 0, errors
        return out.split()[-1]


def begin_reference(spec: Path | str, changes: Sequence[str], *, cwd: Path) -> Reference:
    """Begin to train as the spec says with changes, in a folder with its data."""
    command = [sys.executable, __file__, str(spec), *changes]
    pipe = subprocess.PIPE
    return Reference(subprocess.Popen(command, cwd=cwd, stdout=pipe, stderr=pipe, text=True))


def weights_of(spec: TrainSpec) -> str:
    """Train here and return the digest."""
    import numpy as np
    import torch
    from tests.training.harness import MemoryFeed, Recorder, Seat

    from elastrain.data.dataset import Dataset
    from elastrain.data.plan import Plan
    from elastrain.data.reader import read_rows, sources_of
    from elastrain.observe.ledger import Clock
    from elastrain.training.loop import Loop, fix_threads
    from elastrain.training.precision import fix_arithmetic
    from elastrain.training.reduce import Solo
    from elastrain.training.state import TrainState
    from elastrain.training.task import make_task

    fix_threads(spec.workers.cpus)
    fix_arithmetic(spec.consistency, compiles=spec.compile)
    data, group = Dataset.open(spec.data.train).select(spec.data.columns), Solo()
    plan = Plan.of(data, seed=spec.data.seed, global_batch=spec.data.global_batch, slots=spec.num_slots)
    steps = spec.budget.steps or (spec.budget.epochs or 0) * plan.steps_per_epoch
    arrays = read_rows(data.columns, sources_of(data, np.arange(len(data.group_rows))), np.arange(data.num_rows))
    with tempfile.TemporaryDirectory() as folder:
        loop = Loop(
            spec=spec,
            plan=plan,
            evaluation=None,
            eval_block_rows=1,
            num_steps=steps,
            run_url=folder,
            state=TrainState(spec, make_task(spec, data), torch.device("cpu")),
            feed=MemoryFeed(plan, arrays, None, end=steps, block_rows=1),
            seat=Seat(lambda _: group),
            recorder=Recorder(),
            clock=Clock(),
            info={},
        )
        return str(loop.run()["weights_sha256"])


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from elastrain.spec.document import read_train, resolve

    path, *changed = sys.argv[1:]
    print(weights_of(resolve(read_train(path, changed), base=Path.cwd(), cwd=Path.cwd())))  # noqa: T201 -- its answer
