"""Ours: `elastrain train` as a command, from its start to the end of the first step as its metrics tell."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.cold_start.data import write_spec
from benchmarks.script import finish, options

from elastrain.observe.ledger import read_ledger, read_steps

COMMAND = "from elastrain.__main__ import main; main()"


def main() -> None:
    """Run the command once; report when the first step had ended, and the parts that the ledger knows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec = write_spec(folder, str(Path(options()["data"]).resolve()))
        start = time.time()
        command = [sys.executable, "-c", COMMAND, "train", str(spec), "--json"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        wall_s = time.time() - start
        if done.returncode:
            raise SystemExit(done.stderr)
        run = str(folder / "runs" / "cold-start")
        first = float(read_steps(f"{run}/metrics")["ended"][0].as_py())
        began = next(record["t"] for record in read_ledger(run) if record["kind"] == "start")
    measures = {"first_step_s": first - start, "ray_and_actors_s": began - start, "command_s": wall_s}
    finish(measures, {"workers": 2, "steps": 1})


if __name__ == "__main__":
    main()
