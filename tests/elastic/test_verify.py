"""`elastrain verify`: what it refuses, how it compares, what it says of each event, and the proof itself."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.elastic.test_run import wait_for
from typer.testing import CliRunner

from elastrain.__main__ import app
from elastrain.data.columns import to_table
from elastrain.elastic import verify
from elastrain.elastic.histories import Event, parse_history, random_history
from elastrain.elastic.run import Run
from elastrain.elastic.script import Act, Member, Play, Resize, Seen
from elastrain.errors import ElastrainError, SpecError
from elastrain.observe.ledger import StepLog, read_ledger
from elastrain.observe.report import read_report
from elastrain.spec.document import read_train
from elastrain.spec.train import TrainSpec

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "pipelines" / "digits_mlp" / "train.yaml"
GPT = ROOT / "pipelines" / "tiny_gpt" / "train.yaml"
DEMO = "4, kill@30, 2, 3, drain@80, 1"
AUDIT = pa.schema([(name, pa.int64()) for name in ("epoch", "step", "slot", "row")])
METRICS = pa.schema([("step", pa.int64()), ("ended", pa.float64())])
Line = tuple[int, int, int, int]
LINES: list[Line] = [(0, row // 4, row // 2 % 2, row) for row in range(10)]  # three steps of 4, 4 and 2 rows

run = CliRunner().invoke


def write(folder: Path, lines: list[Line]) -> str:
    log = StepLog(str(folder / "audit"), AUDIT, resume_step=0)
    for step, slot in dict.fromkeys(line[1:3] for line in lines):
        rows = np.array([line for line in lines if line[1:3] == (step, slot)], np.int64)
        log.add(step, slot, dict(zip(AUDIT.names, rows.T, strict=True)))
    log.flush(10)
    return str(folder)


def run_at(url: str, weights: str = "a" * 64, loss: float = 0.5) -> Run:
    return Run(url, {"weights_sha256": weights, "metrics": {"val_loss": loss}, "step": 3})


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainSpec:
    """The digits spec on ten rows, three steps an epoch."""
    rows = {"image": np.zeros((10, 8, 8), np.uint8), "label": np.zeros(10, np.uint8)}
    (tmp_path / "data").mkdir()
    pq.write_table(to_table(rows), tmp_path / "data" / "rows.parquet")
    monkeypatch.chdir(tmp_path)
    changes = ["data={train: data, global_batch: 4, slots: 2}", "budget={epochs: 2}", "workers.max=2"]
    return read_train(DIGITS, changes)


# --- what is refused, before anything starts


@pytest.mark.parametrize(
    ("history", "said"),
    [
        ("2, kil@30", "column 4: 'kil@30': expected .*did you mean 'kill'"),
        ("kill@30, 4", "column 1: kill@30 comes first"),
        ("3", "column 1: 3 workers, expected 1 to 2: a worker needs a slot"),
        ("2, kill@6", "column 4: kill@6, expected a step from 1 to 5"),
    ],
)
def test_a_bad_history_is_a_usage_error(spec: TrainSpec, history: str, said: str) -> None:
    del spec  # its data are in the working folder
    sets = ["--set", "data={train: data, global_batch: 4, slots: 2}", "--set", "budget={epochs: 2}"]
    done = run(app, ["verify", str(DIGITS), "--history", history, *sets, "--set", "workers.max=2"])
    with pytest.raises(SpecError, match=said):
        raise done.exception or AssertionError(done.output)
    assert not done.stdout
    assert not Path("runs").exists()


def test_the_command_line_ends_with_2_and_one_sentence(spec: TrainSpec) -> None:
    del spec  # its data are in the working folder
    sets = ["--set", "data={train: data, global_batch: 4, slots: 2}", "--set", "workers.max=2"]
    command = [sys.executable, "-m", "elastrain", "verify", str(DIGITS), "--history", "2, kil@30", *sets, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith('elastrain: error: history "2, kil@30", column 4: ')
    assert len(done.stderr.splitlines()) == 1


def test_a_history_is_not_optional() -> None:
    assert run(app, ["verify", str(DIGITS)]).exit_code == 2


def test_gpus_are_not_shared(spec: TrainSpec) -> None:
    gpus = spec.model_copy(update={"workers": spec.workers.model_copy(update={"gpus": 1.0})})
    with pytest.raises(SpecError, match=r"--set workers\.gpus=0"):
        verify.prepare(gpus, "2")


# --- what is trained


def test_both_runs_prove_to_the_bit(spec: TrainSpec) -> None:
    proof = verify.prepare(spec, "1, 2, kill@3")
    for run_spec in (proof.undisturbed, proof.disturbed):
        assert (run_spec.consistency, run_spec.audit, run_spec.data.slots) == ("bitwise", True, 2)
        assert run_spec.storage.endswith("runs/digits-mlp-verify")
    assert (proof.undisturbed.workers.min, proof.undisturbed.workers.max) == (1, 1)
    assert (proof.disturbed.workers.min, proof.disturbed.workers.max) == (1, 2)
    assert proof.steps == 6


# --- what is compared


def test_equal_runs_differ_in_nothing(spec: TrainSpec, tmp_path: Path) -> None:
    proof = verify.prepare(spec, "2")
    lines = LINES + [(1, step + 3, slot, row) for _, step, slot, row in LINES]
    one, other = write(tmp_path / "one", lines), write(tmp_path / "other", lines)
    assert verify.compare(run_at(one), run_at(other), proof) == []


def test_what_differs_is_named(spec: TrainSpec, tmp_path: Path) -> None:
    proof = verify.prepare(spec.model_copy(update={"budget": spec.budget.model_copy(update={"epochs": 1})}), "2")
    one = write(tmp_path / "one", LINES)
    swapped = [(e, s, slot, {4: 5, 5: 4}.get(row, row)) for e, s, slot, row in LINES]
    other = write(tmp_path / "other", swapped)
    assert verify.compare(run_at(one), run_at(other, "b" * 64, 0.6), proof) == [
        "line 4 of the audit is (epoch 0, step 1, slot 0, row 4) undisturbed "
        "and (epoch 0, step 1, slot 0, row 5) disturbed",
        "weights_sha256 is aaaaaaaaaaaa… undisturbed and bbbbbbbbbbbb… disturbed",
        "val_loss is 0.5 undisturbed and 0.6 disturbed",
    ]
    lost = write(tmp_path / "lost", [line for line in LINES if line[3] not in (8, 9)])
    assert verify.compare(run_at(one), run_at(lost), proof) == [
        "in epoch 0 2 samples were trained on not at all (rows 8, 9)",
        "line 8 of the audit is (epoch 0, step 2, slot 0, row 8) undisturbed and at its end disturbed",
    ]
    twice = write(tmp_path / "twice", [*LINES[:9], (0, 2, 0, 8)])
    found = verify.compare(run_at(one), run_at(twice), proof)
    assert found[:2] == [
        "in epoch 0 1 samples were trained on twice (rows 8)",
        "in epoch 0 1 samples were trained on not at all (rows 9)",
    ]
    (tmp_path / "none").mkdir()
    assert verify.missing(str(tmp_path / "none"), proof) == ["the disturbed run left no audit"]


def test_an_epoch_that_the_budget_cuts_misses_nothing(spec: TrainSpec, tmp_path: Path) -> None:
    short = spec.model_copy(update={"budget": spec.budget.model_copy(update={"epochs": None, "steps": 2})})
    url = write(tmp_path / "short", LINES[:8])
    assert verify.missing(url, verify.prepare(short, "2")) == []


# --- what an event cost

MEMBERS = [Member(name=name, node=f"node-{name}", pid=pid) for pid, name in enumerate("abcd", start=10)]


def act(event: Event, *, step: int, at: float, done: float, left: int, lowest: int | None = None) -> Act:
    """An act that hit the members after the first `left`."""
    hit = frozenset(m.name for m in MEMBERS[left:]) if event.word else frozenset()
    lowest = step if lowest is None else lowest
    kept = tuple(MEMBERS[:left])
    return Act(event=event, step=step, at=at, before=tuple(MEMBERS), victims=hit, lowest=lowest, done=done, after=kept)


def test_costs_are_read_from_the_metrics(tmp_path: Path) -> None:
    log = StepLog(str(tmp_path / "metrics"), METRICS, resume_step=0)
    ended = [0.1 * step for step in range(10)] + [1.4 + 0.1 * step for step in range(10)]  # 0.9 s, then 1.4 s
    for step, moment in enumerate(ended):
        log.add(step, 0, {"step": np.array([step], np.int64), "ended": np.array([moment])})
    log.flush(20)
    acts = [
        act(Event(None, 4), step=0, at=-5.0, done=0.2, left=4),
        act(Event("kill", 7), step=7, at=0.95, done=1.6, left=3),
        act(Event("node", 7), step=7, at=0.95, done=1.6, left=3, lowest=2),
        act(Event(None, 2), step=8, at=0.85, done=1.6, left=2),
        act(Event("drain", 15), step=15, at=1.85, done=2.1, left=3),
    ]
    kill, node, size, drain = verify.events(acts, str(tmp_path))
    assert (kill["event"], kill["kind"], kill["step"], kill["steps_redone"]) == ("kill@7", "worker_lost", 7, 0)
    assert kill["recovery_s"] == pytest.approx(1.4 - 0.95)
    assert (kill["workers"], kill["survivors"], kill["survivors_kept"]) == (3, 3, 3)
    assert (node["kind"], node["steps_redone"]) == ("node_lost", 5)
    assert (size["kind"], size["recovery_s"]) == ("resize", pytest.approx(1.4 - 0.9))
    assert (drain["kind"], drain["recovery_s"]) == ("preemption", pytest.approx(0.1))


SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


class Nodes:
    """A cluster that only notes what is done to it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.done: list[str] = []

    def drain(self, node: str) -> None:
        """Note it."""
        self.done.append(f"drain {node}")
        self.size -= 1

    def mend(self) -> None:
        """Nothing has ended by itself."""

    def lose(self, node: str) -> None:
        """Note it."""
        self.done.append(f"lose {node}")
        self.size -= 1

    def add(self) -> str:
        """Note it."""
        self.done.append("add")
        self.size += 1
        return "node"


def test_a_stage_signals_processes_and_replaces_nodes_that_are_still_wanted(spec: TrainSpec) -> None:
    long = spec.model_copy(update={"budget": spec.budget.model_copy(update={"epochs": 30})})
    proof = verify.prepare(long, "2, kill@3, node@9, 1, drain@30")
    nodes = Nodes(2)
    stage = verify.Stage(Play(proof.history, proof.steps), nodes)  # type: ignore[arg-type] # as far as it is used
    with subprocess.Popen(SLEEP) as first, subprocess.Popen(SLEEP) as second:
        both = [Member(name=str(p.pid), node=f"n{p.pid}", pid=p.pid) for p in (first, second)]
        assert stage.act(Seen(step=0, members=both)) == [Resize(1, 2)]
        for step in range(1, 6):
            stage.act(Seen(step=step, members=both))
        (victim,) = stage.play.acts[-1].victims
        struck, other = (first, second) if str(first.pid) == victim else (second, first)
        assert struck.wait(timeout=5) == -signal.SIGKILL
        assert other.poll() is None
        left = [member for member in both if member.pid == other.pid]
        for step in range(6, 40):
            stage.act(Seen(step=step, members=left))
        other.kill()
    assert nodes.done == [f"lose n{other.pid}", "add"], "the last step is trained by one: a second node is not wanted"


def test_a_difference_ends_with_1_after_the_result(monkeypatch: pytest.MonkeyPatch, spec: TrainSpec) -> None:
    del spec
    side: dict[str, Any] = {"step": 3, "wall_s": 1.0, "weights_sha256": "a" * 64, "run": "/r"}
    found = {"equal": False, "undisturbed": side, "disturbed": side, "events": [], "difference": "the weights"}
    monkeypatch.setattr("elastrain.elastic.verify.verify_run", lambda *_, **__: found)
    done = run(app, ["verify", str(DIGITS), "--history", "2", "--json"])
    assert json.loads(done.stdout.splitlines()[-1])["equal"] is False
    assert type(done.exception) is ElastrainError
    assert done.exception.exit_code == 1
    assert "the weights" in str(done.exception)
    assert "not equal: the weights" in verify.as_text(found)


# --- the proof itself


FIRST_SEED, CELL_HISTORIES = (int(os.environ.get(name, "0")) for name in ("FIRST_SEED", "CELL_HISTORIES"))
HISTORY = "3, kill@10, 3, stop@30, 2, drain@50, 1, 2, node@70"
HISTORIES = [str(random_history(seed, slots=4, steps=400)) for seed in range(FIRST_SEED, FIRST_SEED + CELL_HISTORIES)]


def proved(cli: Callable[..., Any], name: str, history: str, *changes: str) -> dict[str, Any]:
    """What `elastrain verify` finds of a history: that the runs are equal, and what each event did."""
    fixed = ("precision=fp32", "data.slots=4", "workers.timeout_s=5", f"name={name}")
    arguments = [part for change in (*fixed, *changes) for part in ("--set", change)]
    done = cli("verify", str(DIGITS), "--history", history, *arguments, "--json", timeout=500)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["equal"] is True
    assert found["undisturbed"]["weights_sha256"] == found["disturbed"]["weights_sha256"]
    assert [event["event"] for event in found["events"]] == history.split(", ")[1:]
    return found


@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.parametrize("history", HISTORIES)
def test_a_disturbed_run_is_equal_to_the_bit(cli: Callable[..., Any], history: str, slow_task: Path) -> None:
    """`CELL_HISTORIES=20 FIRST_SEED=0 pytest tests/elastic/test_verify.py -k disturbed_run` tries some by chance.

    Steps take some 0.1 s, so that the last events find the run still at it, however busy the machine is.
    """
    proved(cli, f"proof-{HISTORIES.index(history)}", history, "budget={steps: 400}", f"task={slow_task}:Slow")


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_run_in_which_somebody_is_always_left_starts_nothing_again(
    cli: Callable[..., Any], slow_task: Path, workspace: Path
) -> None:
    """It takes its time from its beginning until its last node is lost, so that all events find it still at it."""
    fast, run = slow_task.with_name("fast"), workspace / "runs" / "proof-verify" / "disturbed"
    fast.touch()
    slowly = (f"task={slow_task}:Slow", "task_args.pause=0.1", "budget={steps: 150}")
    with ThreadPoolExecutor(1) as pool:
        proving = pool.submit(proved, cli, "proof", HISTORY, *slowly)
        try:
            wait_for(lambda: (run / "ledger").exists() or proving.done())
            fast.unlink()
            wait_for(lambda: proving.done() or [each for each in read_ledger(str(run)) if each["kind"] == "node_lost"])
        finally:
            fast.touch()
        found = proving.result()
    assert found["disturbed"]["restarts"] == 0
    for event in found["events"]:
        assert event["steps_redone"] == 0, event
        assert event["survivors_kept"] in (None, event["survivors"]), event
    check_losses(found["disturbed"])


def check_losses(run: dict[str, Any]) -> None:
    """The ledger tells of each loss by a signal what it has cost, part by part."""
    losses = [event for event in read_report(run["run"])["events"] if event["kind"] == "worker_lost"]
    assert len(losses) >= 2
    for loss in losses:
        assert loss["steps_redone"] <= 1
        parts = sum(loss[name] for name in ("detect_s", "agree_s", "connect_s", "state_s", "step_s"))
        assert 0 < parts <= loss["recovery_s"] * 1.01


def test_the_shipped_gpt_has_room_for_the_demonstration() -> None:
    spec = read_train(GPT, ["budget.steps=200"])
    assert spec.num_slots >= 6
    parse_history(DEMO, slots=spec.num_slots, steps=200)
    for page in ("README.md", "README.zh-CN.md"):
        assert f'--history "{DEMO}"' in (ROOT / page).read_text()
