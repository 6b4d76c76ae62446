"""Plain Ray Train: TorchTrainer, DDP by hand, a checkpoint every 20 steps, as many restarts as it takes.

The same network, batch and sleep as ours, on rows made in memory: a restart has no data to come back to.
"""

import os
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.recovery.contender import Command
from benchmarks.recovery.scenario import Watch, kill_one, soak
from benchmarks.script import finish, options

BATCH, CHECKPOINT_STEPS = 64, 20


class RayTrain:
    """The script as a command; rank 0 writes down the end of each step, every rank its process."""

    def __init__(self, folder: Path, given: dict[str, Any]) -> None:
        self._folder = folder
        (folder / "ranks").mkdir()
        script = [sys.executable, "-m", "benchmarks.recovery.ray_train"]
        self.command = Command([*script, str(folder), str(given["workers"]), str(given["forward_s"])], folder)

    def lines(self) -> Iterable[tuple[int, float]]:
        """Return (step, Unix time of its end)."""
        try:
            text = (self._folder / "steps").read_text()
        except FileNotFoundError:
            return []
        found = [line.split() for line in text[: text.rfind("\n") + 1].splitlines()]
        return [(int(step), float(ended)) for step, ended in found]

    def workers(self) -> list[int]:
        """Return the living ranks."""
        ranks = {int(path.name) for path in (self._folder / "ranks").iterdir()}
        return sorted(ranks & set(self.command.look()))


def worker(config: dict[str, Any]) -> None:
    """Train from the last checkpoint on."""
    import ray.train  # noqa: PLC0415
    import torch  # noqa: PLC0415
    from torch import nn  # noqa: PLC0415
    from torch.nn.parallel import DistributedDataParallel  # noqa: PLC0415

    torch.set_num_threads(1)
    torch.manual_seed(0)
    context, folder = ray.train.get_context(), Path(config["folder"])
    rank, rows = context.get_world_rank(), BATCH // context.get_world_size()
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001, fused=True)
    step = 0
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as path:
            saved = torch.load(Path(path) / "state.pt")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    parallel = DistributedDataParallel(model)
    image, label = torch.rand(rows, 64), torch.randint(0, 10, (rows,))
    (folder / "ranks" / str(os.getpid())).touch()
    with (folder / "steps").open("a", buffering=1) as lines:
        while True:
            time.sleep(config["forward_s"])
            loss = nn.functional.cross_entropy(parallel(image), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
            if rank == 0:
                lines.write(f"{step} {time.time()}\n")
            step += 1
            if step % CHECKPOINT_STEPS == 0:
                save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, rank)


def save(state: dict[str, Any], rank: int) -> None:
    """Report a checkpoint as Ray's guide does: all ranks report, rank 0 brings the files."""
    import ray.train  # noqa: PLC0415
    import torch  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as folder:
        if rank == 0:
            torch.save(state, Path(folder) / "state.pt")
        checkpoint = ray.train.Checkpoint.from_directory(folder) if rank == 0 else None
        ray.train.report({"step": state["step"]}, checkpoint=checkpoint)


def script(folder: str, workers: int, forward_s: float) -> None:
    """What a user would put in a file and start with `python`."""
    import ray  # noqa: PLC0415
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig  # noqa: PLC0415
    from ray.train.torch import TorchTrainer  # noqa: PLC0415

    ray.init(address="local", num_cpus=workers + 2, include_dashboard=False)
    TorchTrainer(
        worker,
        train_loop_config={"folder": folder, "forward_s": forward_s},
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(
            name="recovery",
            storage_path=f"{folder}/runs",
            failure_config=FailureConfig(max_failures=-1),
            checkpoint_config=CheckpointConfig(num_to_keep=3),
        ),
    ).fit()


def main() -> None:
    """Start the script as a command of its own, kill, and tell."""
    if len(sys.argv) == 4:
        script(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
        return
    given = options()
    if given["poll_s"] is not None:
        os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = str(given["poll_s"])
    with tempfile.TemporaryDirectory(prefix="eb-", ignore_cleanup_errors=True) as name:
        contender = RayTrain(Path(name), given)
        try:
            watch = Watch(contender)
            measures = soak(watch, given) if "every_s" in given else kill_one(watch, given["workers"])[1]
        finally:
            contender.command.end()
    finish(measures, {"workers": given["workers"]})


if __name__ == "__main__":
    main()
