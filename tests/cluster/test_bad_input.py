"""What users get wrong about clusters and jobs: a sentence, an exit code, and nothing half-started. No Ray runs."""

from pathlib import Path

import pytest
from tests.cluster.head import free_port
from typer.testing import CliRunner

from elastrain.__main__ import app
from elastrain.errors import ElastrainError

ROOT = Path(__file__).parents[2]
AWS = str(ROOT / "clusters" / "aws.yaml")
RUN = str(ROOT / "pipelines" / "digits_mlp" / "train.yaml")
NAMES = ("a/b", "a;b", "../up")
RUNS = "name: expected up to 128 letters, digits, dots, dashes and underscores; the run lives in <storage>/<name>, got "
MACHINES = "small letters, digits and dashes, and begins with a letter, got "
NOBODY = f"http://127.0.0.1:{free_port()}"


@pytest.mark.parametrize(
    ("command", "code", "text"),
    [
        (("cluster", "check", AWS, "--set", "provider.type=asw"), 2, "got 'asw'; did you mean 'aws'"),
        (("cluster", "check", AWS, "--set", "pools.1.accelerator.type=T5"), 2, "Ray knows no accelerator 'T5'"),
        (("cluster", "plan", AWS, RUN, "--set", "workers.cpus=500"), 6, "can ever hold a worker of 500 CPUs"),
        (("submit", RUN, "--address", NOBODY), 6, "no Ray cluster answers at"),
        (("status", "--address", NOBODY), 6, "no Ray cluster answers at"),
        (("stop", "a-job", "--address", NOBODY), 6, "no Ray cluster answers at"),
        (("submit", RUN, "--address", "head:6379"), 2, "a job is sent to the cluster's dashboard"),
        (("submit", RUN), 2, "no cluster is named"),
        (("logs", "a-job", "--address", NOBODY), 6, "no Ray cluster answers at"),
        (("logs", "a-job", "--address", NOBODY, "--follow"), 6, "no Ray cluster answers at"),
        (("cluster", "why-up", "--address", NOBODY.removeprefix("http://")), 6, "no Ray answers at"),
        *((("submit", RUN, "--address", NOBODY, "--set", f"name={name}"), 2, f"{RUNS}'{name}'") for name in NAMES),
        *((("cluster", "check", AWS, "--set", f"name={name}"), 2, f"{MACHINES}'{name}'") for name in NAMES),
        *((("cluster", "render", AWS, "--set", f"pools.0.name={name}"), 2, f"{MACHINES}'{name}'") for name in NAMES),
    ],
)
def test_a_mistake_is_a_sentence_and_an_exit_code(
    command: tuple[str, ...], code: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, ElastrainError), done.output
    assert done.exception.exit_code == code
    assert text in str(done.exception)
    assert not list(tmp_path.iterdir())
