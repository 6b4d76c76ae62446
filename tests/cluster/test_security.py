"""`doctor --security` on real heads of this machine: one that asks for tokens on every port, and one that does not."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.head import Head, free_port, head
from typer.testing import CliRunner

from elastrain.__main__ import app
from elastrain.cluster.doors import knock, listeners
from elastrain.cluster.environment import NO_EXPORTERS
from elastrain.doctor import as_text, failure
from elastrain.errors import ResourceError, SpecError

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

PORTS = ["GCS", "dashboard and jobs", "raylet", "object manager", "runtime env agent", "agent", "agent's HTTP"]
PLANTED = "planted-5d0c1e"


@contextmanager
def started(**environment: str) -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="elastrain-"))
    try:
        with head(folder / "head", cpus=1, environment=environment) as found:
            yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def closed() -> Iterator[Head]:
    with started(**NO_EXPORTERS) as found:
        yield found


def elastrain(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "elastrain", *arguments]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=240, check=False
    )


def doctor(address: str, **environment: str) -> tuple[int, dict[str, Any], dict[str, dict[str, str]]]:
    done = elastrain("doctor", "--security", "--address", address, "--json", **environment)
    found = json.loads(done.stdout.splitlines()[-1])
    return done.returncode, found, {check["name"]: check for check in found["checks"]}


@pytest.fixture
def token(tmp_path: Path) -> Path:
    """The token of this user's clusters in a file that nobody else can read."""
    given = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
    path = tmp_path / "token"
    path.touch(mode=0o600)
    path.write_bytes(Path(given).read_bytes())
    return path


def test_a_closed_cluster_refuses_on_every_port_that_its_processes_hold_open(closed: Head, token: Path) -> None:
    code, found, checks = doctor(closed.address, RAY_AUTH_TOKEN_PATH=str(token))
    assert code == 0, found
    assert found["ok"]
    assert [checks[name]["found"] for name in PORTS] == ["1 of 1 refuse who has no token"] * len(PORTS)
    assert "workers and others" in checks, "the ports that Ray does not tell are found, too"
    assert not {"metrics", "other ports"} & checks.keys(), found
    assert checks["token file"]["state"] == checks["TLS"]["state"] == "ok"
    # Nothing is believed: every socket that the kernel knows of refuses.
    mine = listeners([closed.address, str(closed.folder / "ray")])
    assert len({each.port for each in mine}) >= len(PORTS)
    assert {each.port: knock(each.reachable, each.port) for each in mine} == {each.port: "refused" for each in mine}


def test_a_cluster_without_tokens_fails_on_every_port(token: Path) -> None:
    with started(RAY_AUTH_MODE="disabled", RAY_enable_metrics_collection="true") as found:
        code, told, checks = doctor(found.address, RAY_AUTH_TOKEN_PATH=str(token))
    assert code == 6
    assert not told["ok"]
    for name in PORTS:
        assert checks[name]["state"] == "fail", told
        assert "a request without a token is answered" in checks[name]["found"]
    assert checks["metrics"]["state"] == "warn", "the exporters, which this head has left on"
    assert as_text(told).startswith("ok    ray ")
    assert "checks failed (GCS, dashboard and jobs" in str(failure(told))


def test_a_token_that_others_can_read_and_a_secret_in_a_job_are_found(closed: Head, token: Path) -> None:
    from ray.job_submission import JobSubmissionClient

    environment = {"HF_TOKEN": PLANTED, "NCCL_DEBUG": "WARN"}
    JobSubmissionClient(closed.url).submit_job(
        entrypoint=f"true --api-key={PLANTED}", submission_id="careless", runtime_env={"env_vars": environment}
    )
    token.chmod(0o644)
    code, found, checks = doctor(closed.address, RAY_AUTH_TOKEN_PATH=str(token))
    assert code == 6
    assert "chmod 600" in checks["token file"]["found"]
    said = checks["secrets in jobs"]
    assert said["state"] == "fail"
    assert "careless runtime_env.env_vars.HF_TOKEN" in said["found"]
    assert "careless entrypoint" in said["found"]
    assert "NCCL" not in said["found"]
    assert PLANTED not in json.dumps(found)


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (("--security", "--address", "127.0.0.1:PORT"), ResourceError, "no Ray answers at 127.0.0.1:"),
        (("--security", "--address", "http://127.0.0.1:8265"), SpecError, "give Ray's own address"),
        (("--security", "runs"), SpecError, "takes either a storage, or --security"),
        (("--address", "127.0.0.1:6379"), SpecError, "takes either a storage, or --security"),
    ],
)
def test_an_address_that_is_none_is_a_sentence(arguments: tuple[str, ...], kind: type[Exception], words: str) -> None:
    done = CliRunner().invoke(app, ["doctor", *(each.replace("PORT", str(free_port())) for each in arguments)])
    assert isinstance(done.exception, kind), done.output
    assert words in str(done.exception)
    assert not done.output


def test_a_cluster_whose_token_we_lack_lets_nobody_look(closed: Head, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.touch(mode=0o600)
    wrong.write_text(secrets.token_hex(32))
    done = elastrain("doctor", "--security", "--address", closed.address, RAY_AUTH_TOKEN_PATH=str(wrong))
    assert done.returncode == 6, done.stdout
    assert "does not let us in" in done.stderr.splitlines()[-1]
    done = elastrain("cluster", "why-up", "--address", closed.address, RAY_AUTH_TOKEN_PATH=str(wrong))
    assert done.returncode == 6, done.stdout
    said = done.stderr.splitlines()[-1]  # Ray has a line of its own before
    assert f"{closed.address} does not let us in (" in said
    assert "put the cluster's token into ~/.ray/auth_token" in said
