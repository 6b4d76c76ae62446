"""The command line: what it takes, what it prints, and what it hands on."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from elastrain.__main__ import app
from elastrain.errors import ElastrainError, SpecError

run = CliRunner().invoke


def test_schema_prints_one_object_either_way() -> None:
    page, line = run(app, ["schema"]).stdout, run(app, ["schema", "--json"]).stdout
    assert len(page.splitlines()) > 100
    assert len(line.splitlines()) == 1
    assert json.loads(line) == json.loads(page)


def test_every_verb_takes_json() -> None:
    verbs = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined] # it is a group
    verbs.update(verbs.pop("cluster").commands)
    for name, verb in verbs.items():
        assert "--json" in [option for parameter in verb.params for option in parameter.opts], name


@pytest.mark.parametrize("option", ["--row-group-mib", "--shard-mib"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "0", "-1", "1e-9"])
def test_sizes_that_are_none_are_usage_errors(option: str, value: str, tmp_path: Path) -> None:
    done = run(app, ["pack", "digits", str(tmp_path / "out"), option, value])
    assert isinstance(done.exception, SpecError)
    assert done.exception.exit_code == 2
    if value in ("nan", "inf", "-inf"):
        assert str(done.exception) == f"{option} {value}: expected a finite number of MiB, such as 1"
    assert not (tmp_path / "out").exists()


def test_packing_starts_ray_with_all_cpus_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    @contextlib.contextmanager
    def session(address: str | None, *, cpus: float, **_: Any) -> Iterator[None]:
        asked.append((address, cpus))
        yield

    result = {"already": True, "dataset": "out", "splits": {}, "cards": {}}
    monkeypatch.setattr("elastrain.elastic.session.ray_session", session)
    monkeypatch.setattr("elastrain.data.pack.pack_dataset", lambda *_, **__: result)
    monkeypatch.setattr("elastrain.data.pack.get_num_cpus", lambda **_: 48)
    assert run(app, ["pack", "digits", "out"]).stdout == "already packed: out ()\n"
    assert asked == [(None, 48)]


@pytest.mark.parametrize("kind", ["sweep", "cluster", "job"])
def test_no_message_advises_a_command_that_is_not_there(kind: str, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(f"kind: {kind}\n")
    error = run(app, ["plan", str(tmp_path / "spec.yaml")]).exception
    assert isinstance(error, ElastrainError)
    assert f"a {kind} spec" in str(error)
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined] # it is a group
    assert set(re.findall(r"elastrain (\w+)", str(error))) <= set(verbs)
