"""Stands in for the agent of Ray's dashboard on nodes that have no dashboard: it tells that it has no ports.

A raylet starts an agent, waits 15 s for the files in which it tells its ports, and else ends itself, as happens on a
busy machine: Ray's own loads Ray and a server of HTTP first, and then measures all processes every few seconds. A Ray
without its dashboard's packages says the same. Run by its path, `python -S -E no_agent.py AGENT --session-dir=… …`.
"""

import os
import sys
import time

PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")
LOOK_S = 1.0


def tell(folder: str, node: str) -> None:
    """Write the files that a raylet waits for, each whole at once: -1 is no port."""
    for name in PORTS:
        path = os.path.join(folder, f"{name}_{node}")  # noqa: PTH118 -- pathlib takes longer to load than all of this
        with open(f"{path}.tmp", "w") as file:  # noqa: PTH123
            file.write("-1")
        os.replace(f"{path}.tmp", path)  # noqa: PTH105


def main() -> None:
    """Tell, and stay: a raylet ends with its agent."""
    raylet = os.getppid()
    said = dict(each[2:].split("=", 1) for each in sys.argv[1:] if each.startswith("--") and "=" in each)
    tell(said["session-dir"], said["node-id"])
    while os.getppid() == raylet:
        time.sleep(LOOK_S)


if __name__ == "__main__":
    main()
