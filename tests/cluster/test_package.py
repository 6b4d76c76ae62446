"""What is sent with a run: its code and ours; never data, runs, environments; and not more than the limit."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from elastrain.cluster.package import SPEC_FILE, stage
from elastrain.errors import SpecError
from elastrain.spec.document import changed, read_train
from elastrain.spec.train import TrainSpec

SPEC = """
name: packed
task: code/task.py:Net
data: {train: data/train, global_batch: 8, transforms: [{name: custom, function: more/rows.py:turned}]}
optimizer: {name: "shop.rules:Rule", lr: 0.1}
budget: {steps: 1}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as users have them: code beside data, runs, an environment and a repository."""
    files = {
        "spec.yaml": SPEC,
        "code/task.py": "from helpers import width",
        "code/helpers/__init__.py": "width = 3",
        "code/data/loader.py": "a folder named data may be code",
        "code/mine/_manifest.json": "{}",
        "code/mine/part-0.parquet": "rows",
        "code/old/ledger/00000.jsonl": "{}",
        "code/old/spec.yaml": "name: old",
        "code/env/pyvenv.cfg": "",
        "code/env/lib/torch.py": "",
        "code/.git/HEAD": "",
        "code/.env": "SECRET=1",
        "code/__pycache__/task.pyc": "",
        "more/rows.py": "def turned(columns, seeds): return columns",
        "shop/__init__.py": "",
        "shop/rules.py": "class Rule: ...",
        "data/train/x.parquet": "rows",
        "runs/packed/spec.yaml": "",
    }
    for name, text in files.items():
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.syspath_prepend(str(tmp_path / "project"))
    return tmp_path / "project"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """An empty folder."""
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


def read(project: Path) -> TrainSpec:
    return read_train(project / "spec.yaml")


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_code_goes_and_what_is_no_code_stays(project: Path, target: Path) -> None:
    stage(read(project), target)
    sent = {name for name in files(target) if not name.startswith("elastrain/")}
    assert sent == {
        *("run.yaml", "code0/task.py", "code0/helpers/__init__.py", "code0/data/loader.py"),
        *("code1/rows.py", "shop/__init__.py", "shop/rules.py"),
    }
    assert (target / "elastrain" / "training" / "loop.py").exists()


def test_the_spec_that_is_sent_is_the_same_run_wherever_it_is_unpacked(project: Path, target: Path) -> None:
    spec = read(project)
    stage(spec, target)
    moved = target.rename(target.with_name("elsewhere"))
    found = read_train(moved / SPEC_FILE)
    assert found.task == f"{moved}/code0/task.py:Net"
    assert found.data.train == f"{project}/data/train"
    assert found.storage == spec.storage
    assert changed(spec, found) == []


def test_the_elastrain_that_is_sent_works_by_itself(project: Path, target: Path) -> None:
    stage(read(project), target)
    command = [sys.executable, "-m", "elastrain", "train", "--help"]
    done = subprocess.run(command, cwd=target, capture_output=True, text=True, env={}, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_same_run_makes_the_same_files(project: Path, target: Path, tmp_path: Path) -> None:
    stage(read(project), target)
    again = tmp_path / "again"
    again.mkdir()
    stage(read(project), again)
    assert {name: (target / name).read_bytes() for name in files(target)} == {
        name: (again / name).read_bytes() for name in files(again)
    }


def test_too_much_names_the_ten_largest_files_and_writes_nothing(project: Path, target: Path) -> None:
    for index in range(12):
        (project / "code" / f"weights{index:02d}.bin").write_bytes(b"0" * (index + 1) * (1 << 20))
    with pytest.raises(SpecError, match="put the task's file into a folder of its own") as refused:
        stage(read(project), target, limit=50 << 20)
    named = re.findall(r"weights(\d+)\.bin \((\d+)\.0 MiB\)", str(refused.value))
    assert named == [(f"{index:02d}", str(index + 1)) for index in range(11, 1, -1)]
    assert files(target) == set()
