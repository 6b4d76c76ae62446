"""`elastrain cluster check` as a command, a few times."""

import sys

from benchmarks.script import finish, options
from benchmarks.submit.commands import Timed


def main() -> None:
    """Check the shipped cluster of EC2; report the middle time."""
    turns, checked = options()["turns"], Timed()
    for _ in range(turns):
        told = checked.run([sys.executable, "-m", "elastrain", "cluster", "check", "clusters/aws.yaml"], {})
        if "sound" not in told:
            raise SystemExit(told)
    finish({"check_s": checked.wall_s, "check_cpu_s": checked.cpu_s, "none_s": 0.0}, {"turns": turns})


if __name__ == "__main__":
    main()
