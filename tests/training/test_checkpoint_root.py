"""A checkpoint is read within its run only: whatever its manifest names, and wherever links lead."""

import os
from pathlib import Path

import pytest

from elastrain.errors import StorageError
from elastrain.training.manifests import adopt, described, folder, newest_whole, read_manifest, read_verified, seal

SECRET = b"what lies elsewhere on this machine"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a folder for the checkpoint of step 3, and a file beside the run."""
    (tmp_path / "elsewhere").write_bytes(SECRET)
    Path(folder(str(tmp_path / "run"), 3)).mkdir(parents=True)
    return tmp_path / "run"


def checkpoint(run: Path, files: dict[str, bytes], part: str = "") -> None:
    """Write a manifest whose hashes are right, as whoever may write the storage can."""
    manifest = seal(3, {name: described(data) for name, data in files.items()}, {}, part)
    Path(folder(str(run), 3), "manifest.json").write_bytes(manifest)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("../../../elsewhere", ""),
        ("ELSEWHERE", ""),
        ("elsewhere", "../../.."),
        ("x", "../../../elsewhere"),
        (".hidden", ""),
        ("a\\b", ""),
        ("", ""),
    ],
)
def test_a_manifest_that_names_a_path_is_broken(run: Path, name: str, part: str) -> None:
    name = name.replace("ELSEWHERE", str(run.parent / "elsewhere"))
    checkpoint(run, {name: SECRET}, part)
    with pytest.raises(StorageError, match="it names a file that would lie elsewhere"):
        read_manifest(str(run), 3)
    said: list[str] = []
    assert newest_whole(str(run), warn=said.append) is None
    assert "would lie elsewhere" in said[0]


@pytest.mark.parametrize("what", ["file", "manifest", "folder"])
def test_links_that_lead_out_of_the_runs_checkpoints_are_refused(run: Path, what: str) -> None:
    place = Path(folder(str(run), 3))
    checkpoint(run, {"weights": SECRET})
    (place / "weights").write_bytes(SECRET)
    moved = run.parent / "moved"
    links = {"file": place / "weights", "manifest": place / "manifest.json", "folder": place}
    os.rename(links[what], moved)  # noqa: PTH104 -- a file or a folder
    links[what].symlink_to(moved)
    with pytest.raises(StorageError, match="a link that leads out of"):
        read_verified(str(run), 3, read_manifest(str(run), 3), "weights")
    assert newest_whole(str(run), warn=lambda _: None) is None


def test_links_within_and_a_whole_folder_on_another_disk_are_fine(run: Path, tmp_path: Path) -> None:
    checkpoint(run, {"weights": b"kept"})
    (Path(folder(str(run), 3)) / "weights").write_bytes(b"kept")
    (run / "checkpoints").rename(tmp_path / "disk")
    (run / "checkpoints").symlink_to(tmp_path / "disk")
    linked = tmp_path / "linked"
    linked.symlink_to(run)
    assert newest_whole(str(linked), warn=lambda _: None) == 3


def test_what_another_process_gives_is_written_nowhere_else(run: Path) -> None:
    manifest = seal(3, {"/../../../planted": described(SECRET)}, {})
    with pytest.raises(ValueError, match="would lie elsewhere"):
        adopt(str(run), 3, manifest, lambda _: [SECRET])
    assert not (run.parent / "planted").exists()
