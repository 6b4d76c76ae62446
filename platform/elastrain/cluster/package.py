"""What a run needs on other machines, as one folder: its spec, the code that it names, and Elastrain itself.

```
run.yaml      the spec, resolved; the code that it names lies beside it
code0/        the folder of the task's file; code1/ … where an optimizer or a transform lies elsewhere
elastrain/    this package, so that the machines need not have it
PACKAGE/      the package of a `module:Class` that is not installed but lies in a folder of the user's
```
Never in it: data, runs, environments, hidden files. The same run makes the same files, so a second upload is none.
"""

import importlib.util
import io
import os
import shlex
import shutil
import sysconfig
import zipfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import elastrain
from elastrain import storage
from elastrain.data.dataset import MANIFEST, PACKING
from elastrain.errors import SpecError
from elastrain.spec.document import dump, references, train_spec
from elastrain.spec.problems import Keys
from elastrain.spec.train import TrainSpec

SPEC_FILE = "run.yaml"
# `exec`: signals go to Python itself and its exit code is the job's. `python` is what the head's PATH has.
ENTRYPOINT = f"exec python -m elastrain train {SPEC_FILE} --json"
STOP_S = 120  # Ray's own 3 s are too short for a last checkpoint
ENVIRONMENT = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)}
RUN_KEY = "elastrain_run"  # a job's metadata: which run it is of
LIMIT = 64 << 20  # Ray's job server refuses archives over 100 MiB, and each node unpacks what is sent
MAX_FILES = 20_000
NAMED = 10


def stage(spec: TrainSpec, folder: Path, *, limit: int = LIMIT) -> None:
    """Write into the empty `folder` what the run needs; `spec` is resolved.

    Raises SpecError, with nothing written, if that is more than `limit` bytes, naming the ten largest files.
    """
    code = {place: f"code{index}" for index, place in enumerate(_code_folders(spec))}
    trees = {Path(elastrain.__file__).parent: "elastrain"} | code | _packages(spec)
    own = {storage.local_path(url) for url in places(spec) if storage.is_local(url)}
    files = [
        (file, f"{name}/{file.relative_to(place)}")
        for place, name in trees.items()
        for file in islice(_files(place, own), MAX_FILES + 1)
    ]
    _check(files, limit)
    for source, target in files:
        path = folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)
    (folder / SPEC_FILE).write_text(dump(_moved(spec, code)), encoding="utf-8")


def archive(folder: Path, *, limit: int) -> bytes:
    """Return a staged folder as a zip file, the same bytes for the same files.

    Raises SpecError, naming the ten files that take most of it, if that is more than `limit` bytes.
    """
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(path.relative_to(folder).as_posix())  # of 1980, whenever the files were written
            entry.external_attr = 0o644 << 16
            packed.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
    found = written.getvalue()
    if len(found) > limit:
        sizes = sorted(((entry.compress_size, entry.filename) for entry in packed.infolist()), reverse=True)
        raise SpecError(
            f"the run's code is {_mib(len(found))} packed, and at most {_mib(limit)} fit; {_lighten(sizes)}"
        )
    return found


def places(spec: TrainSpec) -> list[str]:
    """Return the paths and URLs of the run's data and of its storage."""
    return [place for place in (spec.data.train, spec.data.eval, spec.storage) if place is not None]


def entrypoint(shared: Sequence[str], *more: str) -> str:
    """Return the command of a job whose machines all have mounted the folders `shared`."""
    return shlex.join([*ENTRYPOINT.split(), *(part for folder in shared for part in ("--shared", folder)), *more])


def _names(spec: TrainSpec) -> list[str]:
    """What the spec names as code: `file.py:Class` and `module:Class`."""
    data = spec.model_dump()
    return [str(_holder(data, keys)[keys[-1]]) for keys in references(spec)]


def _holder(data: Any, keys: Keys) -> Any:
    """Return the mapping in which the last of `keys` stands."""
    for key in keys[:-1]:
        data = data[key]
    return data


def _code_folders(spec: TrainSpec) -> list[Path]:
    """The folders of the spec's files of code, in order; none that lies within another."""
    files = [Path(name.rpartition(":")[0]) for name in _names(spec) if name.rpartition(":")[0].endswith(".py")]
    folders = list(dict.fromkeys(file.parent for file in files))
    return [folder for folder in folders if not any(other in folder.parents for other in folders)]


def _packages(spec: TrainSpec) -> dict[Path, str]:
    """The packages that `module:Class` names and that nobody installed: other machines lack them."""
    installed = [Path(sysconfig.get_path(key)).resolve() for key in ("purelib", "platlib", "stdlib")]
    found = {}
    for name in _names(spec):
        top = name.rpartition(":")[0].partition(".")[0]
        known = importlib.util.find_spec(top) if not name.rpartition(":")[0].endswith(".py") else None
        places = list(known.submodule_search_locations or ()) if known else []
        for place in (Path(place).resolve() for place in places[:1]):
            if top != "elastrain" and not any(root in place.parents for root in installed):
                found[place] = top
    return found


def _moved(spec: TrainSpec, code: dict[Path, str]) -> TrainSpec:
    """Return the spec with its files of code where they lie in the package, relative to the spec's own file."""
    data = spec.model_dump()
    for keys in references(spec):
        parent = _holder(data, keys)
        left, _, name = str(parent[keys[-1]]).rpartition(":")
        for folder, beside in code.items():
            if left.endswith(".py") and folder in Path(left).parents:
                parent[keys[-1]] = f"{beside}/{Path(left).relative_to(folder).as_posix()}:{name}"
    return train_spec(data)


def _files(root: Path, own: set[Path]) -> Iterator[Path]:
    """The files under `root` in order, without hidden ones, caches, environments, data and runs (`own`: this run's)."""
    for folder, names, files in os.walk(root):
        here = Path(folder)
        names[:] = sorted(name for name in names if here / name not in own and not _left_out(here / name))
        yield from (here / name for name in sorted(files) if name[0] != "." and (here / name).is_file())


def _left_out(folder: Path) -> bool:
    """Say whether a folder is no code: hidden, a cache, an environment, a dataset, a run, or only holds such."""
    if folder.name[0] == "." or folder.name == "__pycache__" or folder.name.endswith(".egg-info"):
        return True
    if (folder / "pyvenv.cfg").exists() or (folder / MANIFEST).exists() or (folder / PACKING).exists():
        return True
    return (folder / "ledger").is_dir() and (folder / "spec.yaml").exists()


def _check(files: list[tuple[Path, str]], limit: int) -> None:
    sizes = sorted(((source.stat().st_size, str(source)) for source, _ in files), reverse=True)
    total = sum(size for size, _ in sizes)
    if total <= limit and len(files) <= MAX_FILES:
        return
    raise SpecError(
        f"the run's code is {_mib(total)} in {len(files):,} files, and at most {_mib(limit)} in {MAX_FILES:,} are "
        f"sent; {_lighten(sizes)}"
    )


def _lighten(sizes: list[tuple[int, str]]) -> str:
    largest = ", ".join(f"{path} ({_mib(size)})" for size, path in sizes[:NAMED])
    return (
        f"put the task's file into a folder of its own, or move what is no code out of it; the largest files: {largest}"
    )


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"
