"""The page from laptop to cluster: what needs no machine but this one runs as it stands, the rest is spelt right."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from elastrain.__main__ import app

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "from-laptop-to-cluster.md"


def commands() -> list[list[str]]:
    """Return what the page has users call of ours, without comments, redirections and what runs beside."""
    shown = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    lines = [line for block in shown for line in block.splitlines() if line.startswith("elastrain ")]
    return [shlex.split(line.partition(" > ")[0], comments=True)[1:] for line in lines]


OFFLINE = [each for each in commands() if each[0] == "cluster" or "--rayjob" in each]


@pytest.mark.parametrize("command", OFFLINE, ids=lambda command: " ".join(command[:3]))
def test_what_needs_no_other_machine_works(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("clusters", "pipelines"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, (done.output, done.exception)
    if "render" in command:
        there = {path.name: path.read_text() for path in (tmp_path / "rendered").iterdir()}
        assert there
        assert all((ROOT / "clusters" / "rendered" / name).read_text() == text for name, text in there.items())
        dashboard = done.stdout.splitlines()[-1].partition(": ")[2].partition(" # ")[0].strip()
        assert dashboard.startswith(("ray dashboard ", "kubectl "))
        assert f"\n{dashboard}\n" in PAGE.read_text(), "what is printed to reach the dashboard is what the page says"


def test_all_of_our_commands_and_options_exist() -> None:
    verbs = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined] # it is a group
    assert len(OFFLINE) >= 6
    for command in commands():
        group = verbs[command[0]]
        verb = group.commands[command[1]] if command[0] == "cluster" else group
        known = {option for parameter in verb.params for option in parameter.opts}
        assert {word.partition("=")[0] for word in command if word.startswith("--")} <= known, command


def test_the_files_that_the_page_names_are_there() -> None:
    for name in re.findall(r"(?:clusters|pipelines)/[\w./]+\w", PAGE.read_text()):
        assert (ROOT / name).exists(), name
    for link in re.findall(r"\]\(([^)#:]+)\)", PAGE.read_text()):
        assert (PAGE.parent / link).exists(), link
