"""The limit: one process without Ray that imports torch, reads the same files and takes the same step."""

import subprocess
import sys
import time
from pathlib import Path

from benchmarks.script import finish, options

SCRIPT = """
import sys, time
import numpy as np, pyarrow.parquet as pq, torch
from torch import nn
table = pq.read_table(sys.argv[1]).slice(0, 64)
image = torch.from_numpy(np.stack([np.frombuffer(v.as_py(), np.uint8) for v in table["image"]])).float() / 8 - 1
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.001, fused=True)
loss = nn.functional.cross_entropy(model(image), torch.from_numpy(table["label"].to_numpy().astype(np.int64)))
loss.backward()
optimizer.step()
loss.item()
print(time.time())
"""


def main() -> None:
    """Run the script as a command; report when its step had ended."""
    data = str(Path(options()["data"]).resolve())
    start = time.time()
    command = [sys.executable, "-c", SCRIPT, f"{data}/train/part-00000.parquet"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    wall_s = time.time() - start
    finish({"first_step_s": float(done.stdout) - start, "command_s": wall_s}, {"workers": 1, "steps": 1})


if __name__ == "__main__":
    main()
