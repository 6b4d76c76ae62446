"""The report: what it computes from the ledger, how fast, and a page that stands alone."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastrain import storage
from elastrain.errors import SpecError
from elastrain.observe.ledger import CATEGORIES, Ledger, StepLog
from elastrain.observe.report import TRAIN_KEYS, as_text, read_report, thin, ticks, write_html

SCHEMA = pa.schema(
    [(name, pa.int64()) for name in ("step", "epoch", "samples")]
    + [(name, pa.float64()) for name in ("loss", "lr", "grad_norm", "time_s")]
)
STEPS = 30


class Attempt:
    """One attempt's ledger with a clock that is set by hand."""

    def __init__(self, run: str, number: int, begin: float) -> None:
        self.moment = begin
        self.book = Ledger(run, number, now=lambda: self.moment)

    def at(self, moment: float, kind: str, **fields: Any) -> None:
        """Note an event at a moment."""
        self.moment = moment
        self.book.event(kind, **fields)

    def close(self, moment: float, **seconds: float) -> None:
        """Note what two workers spent, and write the file."""
        self.moment = moment
        for worker in ("a", "b"):
            self.book.spent(worker, {**dict.fromkeys(CATEGORIES, 0.0), **seconds})
        self.book.flush()


def write_steps(run: str, steps: int, loss: float = 2.0) -> None:
    """A metrics folder whose samples are 8 a step."""
    log = StepLog(storage.join(run, "metrics"), SCHEMA, resume_step=0)
    for step in range(steps):
        values = {
            "step": step,
            "epoch": step // 10,
            "samples": 8,
            "loss": loss / (step + 1),
            "lr": 1e-3,
            "grad_norm": 1.0,
        }
        line = {**values, "time_s": 0.01}
        log.add(
            step,
            0,
            {name: np.array([value], SCHEMA.field(name).type.to_pandas_dtype()) for name, value in line.items()},
        )
    log.flush(steps)


def killed_attempt(run: str) -> None:
    """100 s on two workers, killed at step 17 after a checkpoint at step 10 and an evaluation at step 15."""
    first = Attempt(run, 0, 1000.0)
    first.at(1000.0, "start", step=0, workers=3, attempt=0, host="h", versions={"torch": "2.13"}, fingerprint="f")
    first.at(1040.0, "worker_lost", step=4, recovery_s=0.35, steps_redone=0)
    first.at(1050.0, "checkpoint", step=10, bytes=1_000_000, stall_s=0.1, write_s=0.5)
    first.at(1060.0, "eval", step=10, metrics={"val_loss": 0.9, "accuracy": 0.5}, seconds=1.0)
    first.at(1080.0, "eval", step=15, metrics={"val_loss": 77.0, "accuracy": 0.1}, seconds=1.0)
    first.close(1100.0, compute=60.0, reduce=10.0, start=20.0, data=10.0)


@pytest.fixture
def run(tmp_path: Path) -> str:
    """A run of two attempts: the first killed, the second resumed at step 10 and done."""
    run = str(tmp_path / "digits-mlp")
    killed_attempt(run)
    second = Attempt(run, 1, 5000.0)
    second.at(5000.0, "start", step=10, workers=2, attempt=1, host="h", versions={"torch": "2.13"}, fingerprint="f")
    second.at(5010.0, "restart", step=10, recovery_s=9.5, steps_redone=7)
    second.at(5020.0, "resize", step=20, recovery_s=0.03, steps_redone=0, workers=4, why='<b>"joined"</b>')
    second.at(5040.0, "checkpoint", step=30, bytes=3_000_000, stall_s=0.3, write_s=1.5)
    second.at(5045.0, "eval", step=30, metrics={"val_loss": 0.25, "accuracy": 0.97}, seconds=1.0)
    result = {
        "step": STEPS,
        "samples": 240,
        "metrics": {"val_loss": 0.25, "accuracy": 0.97},
        "weights_sha256": "ab" * 32,
    }
    second.at(5050.0, "end", outcome="done", step=STEPS, result=result)
    second.close(5050.0, compute=30.0, reduce=10.0, start=10.0)
    write_steps(run, STEPS)
    storage.put(storage.join(run, "spec.yaml"), b"kind: train\nname: '</pre><script>alert(1)</script>'\n")
    return run


def test_the_report_sums_attempts_and_workers(run: str) -> None:
    report = read_report(run)
    assert {key: report[key] for key in TRAIN_KEYS} == {
        "run": run,
        "step": 30,
        "resumed_from": 10,
        "samples": 240,
        "metrics": {"val_loss": 0.25, "accuracy": 0.97},
        "weights_sha256": "ab" * 32,
        "wall_s": 150.0,
        "goodput": pytest.approx(220 / 300),
        "workers": 4,
        "restarts": 1,
        "resizes": 1,
    }
    assert report["seconds"] == {
        **dict.fromkeys(CATEGORIES, 0.0),
        "compute": 180,
        "reduce": 40,
        "start": 60,
        "data": 20,
    }
    assert sum(report["shares"].values()) == pytest.approx(1.0)
    assert report["outcome"] == "done"
    assert [event["kind"] for event in report["events"]] == ["worker_lost", "restart", "resize"]
    assert all({"kind", "step", "recovery_s", "steps_redone"} <= set(event) for event in report["events"])
    assert report["checkpoint_stall_s"] == pytest.approx(0.4)
    assert report["checkpoint_bytes_per_s"] == pytest.approx(2e6)
    json.dumps(report, allow_nan=False)


def test_what_a_resume_went_back_before_does_not_stand(run: str) -> None:
    assert [record["step"] for record in read_report(run)["evals"]] == [10, 30]


def test_a_killed_run_is_told_from_its_last_checkpoint(tmp_path: Path) -> None:
    run = str(tmp_path / "killed")
    killed_attempt(run)
    write_steps(run, 17)
    report = read_report(run)
    assert (report["outcome"], report["step"], report["samples"]) == ("unfinished", 10, 80)
    assert report["weights_sha256"] is None
    assert "unfinished at step 10" in as_text(report, run)
    assert Path(write_html(run, report)).exists()


def test_a_run_that_only_started_has_a_report(tmp_path: Path) -> None:
    book = Ledger(str(tmp_path), 0)
    book.event("start", step=0, workers=1)
    book.flush()
    report = read_report(str(tmp_path))
    assert (report["step"], report["samples"], report["goodput"], report["metrics"]) == (0, 0, 0.0, {})
    as_text(report, "x")
    check_page(Path(write_html(str(tmp_path), report)).read_text())


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    book = Ledger(str(tmp_path), 0)
    book.event("start", step=0, workers=1)
    book.event("end", outcome="failed", step=3, result={}, error="the loss is nan at step 3 <&>")
    book.flush()
    report = read_report(str(tmp_path))
    assert "failed at step 3" in as_text(report, "r")
    assert "the loss is nan" in as_text(report, "r")
    assert "the loss is nan at step 3 &lt;&amp;&gt;" in Path(write_html(str(tmp_path), report)).read_text()


def test_a_wrong_path_is_told_what_a_run_is(run: str) -> None:
    with pytest.raises(SpecError, match=r"spec\.yaml and ledger/.*holds the runs digits-mlp"):
        read_report(str(Path(run).parent))
    with pytest.raises(SpecError, match="nowhere is no run"):
        read_report("/nowhere")


def test_relative_paths_come_back_absolute(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(run).parent)
    report = read_report("digits-mlp")
    assert report["run"] == run
    assert write_html("digits-mlp", report) == f"{run}/report.html"


def test_the_text_is_short_and_names_what_matters(run: str) -> None:
    text = as_text(read_report(run), "runs/digits-mlp")
    lines = text.splitlines()
    assert lines[0] == "runs/digits-mlp: done at step 30 after 2 min 30 s, resumed at step 10"
    assert re.search(r"accuracy +0\.97", text)
    assert re.search(r"compute +60\.0% +█+ +3 min 00 s", text)
    assert "step 10: restart, back after 9.5 s, 7 steps redone" in text
    assert len(lines) < 30
    assert max(len(line) for line in lines) <= 100


class Page(HTMLParser):
    """Checks that tags close in order and collects what a browser would ask for."""

    void = ("meta", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.asked: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open a tag."""
        self.tags.append(tag)
        self.asked += [str(value) for name, value in attrs if name in ("src", "href", "data", "action")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Close the tag that was opened last."""
        assert self.open.pop() == tag


def check_page(text: str) -> Page:
    """Parse a page and check that it stands alone."""
    page = Page()
    page.feed(text)
    page.close()
    assert not page.open
    assert not page.asked
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "url(" not in text
    assert "@import" not in text
    return page


def test_the_page_stands_alone_and_shows_everything(run: str) -> None:
    path = write_html(run, read_report(run))
    text = Path(path).read_text()
    page = check_page(text)
    assert path == f"{run}/report.html"
    assert page.tags.count("svg") == 5, "loss, two metrics, learning rate, speed"
    assert "prefers-color-scheme: dark" in text
    for told in ("Where the time went", "73.3%", "0.97", "restart, back after 9.5 s", "torch 2.13", "ab" * 32):
        assert told in text
    assert "&lt;/pre&gt;&lt;script&gt;alert(1)" in text
    assert "&lt;b&gt;&quot;joined&quot;&lt;/b&gt;" in text


def test_the_page_of_a_run_on_a_url(tmp_path: Path) -> None:
    run = f"memory://{tmp_path.name}/far"
    killed_attempt(run)
    write_steps(run, 5)
    report = read_report(run)
    assert report["run"] == run
    assert write_html(run, report) == f"{run}/report.html"
    check_page(storage.read_bytes(f"{run}/report.html").decode())


def test_a_loss_that_is_no_number_leaves_a_page(run: str) -> None:
    storage.remove(storage.join(run, "metrics"))
    write_steps(run, 5, loss=float("nan"))
    assert "Training loss" not in Path(write_html(run, read_report(run))).read_text()


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=500), st.sampled_from([10, 100]))
def test_thinning_keeps_the_peaks_and_the_order(values: list[float], limit: int) -> None:
    points = [(float(step), value) for step, value in enumerate(values)]
    thinned = thin(points, limit)
    assert len(thinned) <= max(limit, 1)
    assert set(thinned) <= set(points)
    assert sorted(thinned) == list(thinned)
    assert {min(values), max(values)} <= {value for _, value in thinned}


@given(st.floats(-1e9, 1e9), st.floats(1e-9, 1e9), st.integers(2, 10))
def test_ticks_are_few_and_inside(low: float, width: float, count: int) -> None:
    if low + width > low + abs(low) * 1e-9:
        found = ticks(low, low + width, count)
        assert len(found) <= count + 2
        slack = width * 1e-6 + abs(low) * 1e-12
        assert all(low - slack <= value <= low + width + slack for value in found)


def test_a_long_run_is_reported_at_once_without_pyarrow(tmp_path: Path) -> None:
    run = str(tmp_path / "long")
    book = Ledger(run, 0)
    book.event("start", step=0, workers=2)
    for step in range(100, 20_001, 100):
        book.event("checkpoint", step=step, bytes=1000, stall_s=0.0, write_s=0.1)
        book.event("eval", step=step, metrics={"val_loss": 1 / step}, seconds=0.1)
    book.event("end", outcome="done", step=20_000, result={"step": 20_000, "samples": 1, "metrics": {"val_loss": 0.1}})
    book.flush()
    code = (
        "import sys, time; begin = time.perf_counter(); from elastrain.observe.report import read_report, as_text\n"
        f"as_text(read_report({run!r}), 'x'); took = time.perf_counter() - begin\n"
        "heavy = {'pyarrow', 'numpy', 'rich', 'fsspec', 'torch', 'ray'} & set(sys.modules)\n"
        "assert not heavy, heavy\nprint(took)"
    )
    took = min(float(subprocess.check_output([sys.executable, "-c", code], text=True)) for _ in range(3))
    assert took < 0.5
