"""A plain Ray Train script: TorchTrainer with two workers, Ray Data on the same files, the same network and batch."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.cold_start.data import BATCH
from benchmarks.script import finish, options


def worker(config: dict[str, Any]) -> None:
    """Take one step and note the time; imports stand here, as in a worker they would be done anyway."""
    import ray.train  # noqa: PLC0415
    import torch  # noqa: PLC0415
    from ray.train.torch import prepare_model  # noqa: PLC0415
    from torch import nn  # noqa: PLC0415

    torch.set_num_threads(1)
    model = prepare_model(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001, fused=True)
    shard = ray.train.get_dataset_shard("train")
    batch = next(iter(shard.iter_batches(batch_size=BATCH // 2, batch_format="numpy")))
    image = torch.from_numpy(np.stack([np.frombuffer(value, np.uint8) for value in batch["image"]])).float() / 8 - 1
    loss = nn.functional.cross_entropy(model(image), torch.from_numpy(batch["label"].astype(np.int64)))
    loss.backward()
    optimizer.step()
    loss.item()
    if ray.train.get_context().get_world_rank() == 0:
        Path(config["out"]).write_text(str(time.time()))


def script(data: str, out: str) -> None:
    """What a user would put in a file and start with `python`."""
    import ray  # noqa: PLC0415
    import ray.data  # noqa: PLC0415
    from ray.train import RunConfig, ScalingConfig  # noqa: PLC0415
    from ray.train.torch import TorchTrainer  # noqa: PLC0415

    ray.init(address="local", num_cpus=4, include_dashboard=False)
    with tempfile.TemporaryDirectory() as folder:
        TorchTrainer(
            worker,
            train_loop_config={"out": out},
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(name="cold-start", storage_path=folder),
            datasets={"train": ray.data.read_parquet(f"{data}/train")},
        ).fit()


def main() -> None:
    """Start the script as a command of its own; report when its first step had ended."""
    if len(sys.argv) == 3:
        script(sys.argv[1], sys.argv[2])
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "first"
        data = str(Path(options()["data"]).resolve())
        start = time.time()
        command = [sys.executable, "-m", "benchmarks.cold_start.ray_train", data, str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wall_s = time.time() - start
        if done.returncode or not out.exists():
            raise SystemExit(done.stderr)
        finish({"first_step_s": float(out.read_text()) - start, "command_s": wall_s}, {"workers": 2, "steps": 1})


if __name__ == "__main__":
    main()
