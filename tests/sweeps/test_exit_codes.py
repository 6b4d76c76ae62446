"""A sweep that cannot be, or came to nothing, is one sentence and the exit code of what was in the way."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.sweeps.texts import SEARCH

from elastrain.__main__ import main
from elastrain.data.dataset import Dataset
from elastrain.lock import locked
from elastrain.observe.ledger import Ledger
from elastrain.spec.sweep import SweepSpec
from elastrain.sweeps.begun import extent_of


@contextlib.contextmanager
def in_use(url: Path, _: SweepSpec) -> Iterator[None]:
    with locked(str(url), remedy="wait"):
        yield


@contextlib.contextmanager
def a_file_in_the_way(url: Path, _: SweepSpec) -> Iterator[None]:
    url.parent.write_text("no folder")
    yield


@contextlib.contextmanager
def all_diverged(url: Path, spec: SweepSpec) -> Iterator[None]:
    ledger = Ledger(str(url), 0)
    told = {"arm": "search", "phase": "tune", "number": 0, "point": {"optimizer.lr": 0.1}, "seed": 0}
    ledger.event("trial", trial="search-0000", **told)
    ended = {"step": 35, "device_s": 1.0, "error": "step 35: the loss is nan", "error_kind": ""}
    ledger.event("ended", trial="search-0000", outcome="diverged", **ended)
    ledger.event("end", outcome="done", extent=extent_of(spec))
    ledger.flush()
    yield


@pytest.mark.parametrize(
    ("arguments", "state", "code", "says"),
    [
        (("--set", "objective.every=0"), None, 2, "objective.every: "),
        ((), in_use, 3, "give this sweep another name"),
        ((), "no data", 4, "data/train: "),
        ((), a_file_in_the_way, 5, "cannot write "),
        (("--address", "127.0.0.1:1"), None, 6, "no Ray answers at 127.0.0.1:1: "),
        (
            ("--plan", "--address", "127.0.0.1:1"),
            None,
            6,
            "; start it there with `ray start --head`, or check --address",
        ),
        (("--plan", "--set", "set={workers: {gpus: 4096}}"), None, 6, "lower workers.gpus under `set:`"),
        ((), all_diverged, 7, "no trial came to its end (1 diverged); the first one: step 35: the loss is nan"),
    ],
    ids=["spec", "conflict", "data", "storage", "address", "address of a plan", "room", "diverged"],
)
def test_what_went_wrong_is_told_by_the_exit_code(
    arguments: tuple[str, ...],
    state: Callable[[Path, SweepSpec], contextlib.AbstractContextManager[None]] | str | None,
    code: int,
    says: str,
    read: Callable[..., SweepSpec],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = read(SEARCH)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if state != "no data":
        monkeypatch.setattr(Dataset, "open", lambda _: SimpleNamespace(fingerprint="one"))
    monkeypatch.setattr(sys, "argv", ["elastrain", "sweep", str(tmp_path / "sweep.yaml"), *arguments])
    before = state(tmp_path / "runs" / "search", spec) if callable(state) else contextlib.nullcontext()
    with before, pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr()
    assert ended.value.code == code, told.err
    line = told.err.splitlines()[-1]
    assert line.startswith("elastrain: error: ")
    assert says in line
    assert "Traceback" not in told.err
