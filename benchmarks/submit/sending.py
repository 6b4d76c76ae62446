"""`elastrain submit` and plain `ray job submit` in turns, to one head on this machine.

Both send the same files and start the same command, which ends at once since there are no data; the next turn waits for
that. A head takes long to start, so a process holds both sides.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.script import finish, options
from benchmarks.submit.commands import Timed
from tests.cluster.head import head  # noqa: TID251 -- one way to start a head for tests and benchmarks

from elastrain.cluster.job_server import JobServer, ended
from elastrain.cluster.package import ENTRYPOINT, ENVIRONMENT, stage
from elastrain.spec.document import read_train

SPEC = "pipelines/digits_mlp/train.yaml"
WITHOUT_DATA = 4  # the exit code
TOKEN = {"RAY_AUTH_MODE": "token"}


def main() -> None:
    """Send a run each way, turn by turn; report the middle times."""
    turns, submitted, plain = options()["turns"], Timed(), Timed()
    with tempfile.TemporaryDirectory(prefix="elastrain-") as name:
        folder = Path(name)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        with head(folder / "head", cpus=2, environment={"PATH": path}) as started:
            server = JobServer(started.url)
            for turn in range(turns):
                sets = [f"{key}={folder}/none" for key in ("data.train", "data.eval", "storage")]
                _end(server, _submit(submitted, started.url, [f"name=ours-{turn}", *sets]))
                _end(server, _plain(plain, started.url, folder / f"files-{turn}", [f"name=plain-{turn}", *sets]))
    measures = {"submit_s": submitted.wall_s, "plain_s": plain.wall_s}
    finish(measures | {"submit_cpu_s": submitted.cpu_s, "plain_cpu_s": plain.cpu_s}, {"jobs": 2 * turns})


def _submit(timed: Timed, url: str, sets: list[str]) -> str:
    """Send a run as we do, and return the job's name."""
    command = [sys.executable, "-m", "elastrain", "submit", SPEC, "--address", url, "--json"]
    told = timed.run([*command, *(f"--set={each}" for each in sets)], TOKEN)
    return str(json.loads(told)["job"])


def _plain(timed: Timed, url: str, files: Path, sets: list[str]) -> str:
    """Send the same as Ray's own command does, and return the job's name."""
    files.mkdir()
    stage(read_train(ROOT / SPEC, sets), files)
    command = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", url, "--no-wait"]
    named = ["--submission-id", files.name, "--working-dir", str(files)]
    environment = ["--runtime-env-json", json.dumps({"env_vars": ENVIRONMENT})]
    timed.run([*command, *named, *environment, "--", *ENTRYPOINT.split()], TOKEN)
    return files.name


def _end(server: JobServer, job: str) -> None:
    """Wait for the end of a job; raises SystemExit if it was none of what was meant."""
    while not ended(info := server.info(job)):
        time.sleep(0.2)
    if info.driver_exit_code != WITHOUT_DATA:
        raise SystemExit(f"{job}: exit code {info.driver_exit_code}\n{server.log(job)}")


if __name__ == "__main__":
    main()
