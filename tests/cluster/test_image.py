"""The Dockerfile fits the rest of the repository: versions, extras, what it copies, who it runs as; it is not built."""

import re
import tomllib
from pathlib import Path

from elastrain.cluster.kuberay import RAY_VERSION

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "clusters" / "docker" / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_ray_and_python_are_those_of_the_lock() -> None:
    locked = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    found = re.search(r"^FROM rayproject/ray:(\S+?)-py(\d)(\d+)-cu\d+$", TEXT, re.MULTILINE)
    assert locked
    assert found, "the image has no tag of Ray, Python and CUDA"
    assert found[1] == locked[1] == RAY_VERSION
    assert PROJECT["requires-python"].startswith(f">={found[2]}.{found[3]},")


def test_it_has_what_any_run_may_need_and_nothing_for_developers() -> None:
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", TEXT)
    assert set(extras.split(",")) == PROJECT["optional-dependencies"].keys() - {"dev"}
    installs = re.findall(r"pip install [^&\n;]+", TEXT)
    assert len(installs) == 2
    assert all("-c constraints.txt" in each for each in installs), "something is not held by the lock"


def test_what_it_copies_is_there_and_it_runs_as_a_plain_user_whose_folder_it_builds_in() -> None:
    for names in re.findall(r"^COPY --chown=ray:users (.+) \S+$", TEXT, re.MULTILINE):
        assert all((ROOT / name).exists() for name in names.split()), names
    users = re.findall(r"^USER (\w+)$", TEXT, re.MULTILINE)
    assert users == ["root", "ray"]
    (folder,) = re.findall(r"^WORKDIR (\S+)$", TEXT, re.MULTILINE)
    assert f"install -d -o ray -g users {folder}\n" in TEXT.partition("USER ray")[0], "root's folder: pip cannot build"
