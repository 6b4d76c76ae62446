"""A raylet ends itself where its agent has told no ports after 15 s, as Ray's own on a busy machine."""

import subprocess
import time
from pathlib import Path

from ray._private import ray_constants, services

from elastrain.elastic import ray_inner

NAMES = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")


def test_what_stands_in_for_the_agent_tells_that_it_has_no_ports_and_stays(tmp_path: Path) -> None:
    command = services._build_python_executable_command_memory_profileable
    with ray_inner.patient_start():
        made = services._build_python_executable_command_memory_profileable(
            ray_constants.PROCESS_TYPE_DASHBOARD_AGENT, "session"
        )
        other = services._build_python_executable_command_memory_profileable(
            ray_constants.PROCESS_TYPE_RUNTIME_ENV_AGENT, "session"
        )
    assert services._build_python_executable_command_memory_profileable is command
    assert other == command(ray_constants.PROCESS_TYPE_RUNTIME_ENV_AGENT, "session")
    process = subprocess.Popen([*made, "agent.py", f"--session-dir={tmp_path}", "--node-id=abc", "--head"])
    try:
        while len(found := {path.name: path.read_text() for path in tmp_path.glob("*_abc")}) < len(NAMES):
            assert process.poll() is None
            time.sleep(0.05)
        assert found == {f"{name}_abc": "-1" for name in NAMES}
        assert process.poll() is None, "a raylet ends with its agent"
    finally:
        process.kill()
        process.wait()
