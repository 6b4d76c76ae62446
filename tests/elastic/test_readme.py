"""What the README shows runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


@pytest.mark.ray
def test_the_sdk_example_runs(workspace: Path) -> None:
    link = workspace / "pipelines"
    if not link.exists():
        link.symlink_to(ROOT / "pipelines")
    done = subprocess.run(
        [sys.executable, "-c", blocks("README.md")[0]],
        cwd=workspace,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.match(r"230 0\.9\d+ [0-9a-f]{64}\n\d+% of the paid seconds", done.stdout)


def test_the_task_example_is_a_task() -> None:
    found: dict[str, object] = {}
    exec(blocks("README.md")[1], found)  # noqa: S102 -- our own page
    import elastrain

    assert issubclass(found["Digits"], elastrain.Task)  # type: ignore[arg-type]


def test_both_languages_show_the_same_program() -> None:
    english = [re.sub(r"  #.*", "", line) for line in blocks("README.md")[0].splitlines()]
    chinese = [re.sub(r"  #.*", "", line) for line in blocks("README.zh-CN.md")[0].splitlines()]
    assert english == chinese
