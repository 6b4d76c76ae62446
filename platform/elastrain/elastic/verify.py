"""Proof that anyone can run: train once undisturbed and once through a history, and compare to the bit.

Both runs are real ones on a local cluster, in `<storage>/<name>-verify/`; what happens to the second one is done with
real signals to real processes. They are compared by what they leave on disk, not by what they say.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from elastrain import storage
from elastrain.data.dataset import Dataset
from elastrain.data.plan import Plan
from elastrain.elastic.histories import History, parse_history
from elastrain.elastic.local_cluster import LocalCluster, start_cluster
from elastrain.elastic.run import Run, train
from elastrain.elastic.script import Act, Play, Resize, Seen, Strike
from elastrain.errors import SpecError
from elastrain.observe.ledger import read_steps
from elastrain.observe.progress import duration
from elastrain.observe.report import TRAIN_KEYS
from elastrain.spec.document import resolve
from elastrain.spec.train import TrainSpec

KINDS = {"kill": "worker_lost", "stop": "worker_lost", "node": "node_lost", "drain": "preemption", None: "resize"}
SHOWN_ROWS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """What is to be proven, with what: the two runs' specs and what happens to the second."""

    history: History
    plan: Plan
    steps: int
    undisturbed: TrainSpec
    disturbed: TrainSpec


class Stage:
    """The script of a disturbed run: it passes sizes on to the run and does the rest to the cluster itself."""

    def __init__(self, play: Play, cluster: LocalCluster) -> None:
        self.play = play
        self._cluster = cluster

    @property
    def first(self) -> int:
        """See `Script.first`."""
        return self.play.history.first

    @property
    def wanted(self) -> int:
        """See `Script.wanted`."""
        return self.play.wanted

    def act(self, seen: Seen) -> list[Resize]:
        """See `Script.act`."""
        self._cluster.mend()
        sizes: list[Resize] = []
        for command in self.play.next(seen, time.time()):
            if isinstance(command, Resize):
                sizes.append(command)
            else:
                self._strike(command)
        return sizes

    def _strike(self, strike: Strike) -> None:
        member = strike.member
        if strike.word in ("kill", "stop"):
            number = signal.SIGKILL if strike.word == "kill" else signal.SIGSTOP
            with contextlib.suppress(ProcessLookupError):  # it was faster
                os.kill(member.pid, number)
            return
        (self._cluster.drain if strike.word == "drain" else self._cluster.lose)(member.node)
        while self._cluster.size < self.play.wanted:
            self._cluster.add()


def verify_run(spec: TrainSpec, history: str, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Train undisturbed and through `history` on this machine, and return what `elastrain verify --json` prints.

    `difference` says in a sentence what differs; None if nothing does. `say` is told what goes on.

    Raises:
        SpecError: if the history cannot be read, or the run was over before all of it had happened.
        ConflictError: if this process uses a Ray already.
        ElastrainError: if a run fails.
    """
    proof = prepare(spec, history)
    for remark in _remarks(spec, proof):
        say(remark)
    nodes = proof.history.most if proof.history.hits_nodes else 1
    cpus = int(proof.disturbed.workers.cpus) * proof.history.most // nodes
    play = Play(proof.history, proof.steps)
    say(f"starting {nodes} Ray node{'s' if nodes > 1 else ''} on this machine")
    with start_cluster(nodes=nodes, cpus=cpus) as cluster:
        say(f"training undisturbed ({proof.history.first} at a time)")
        undisturbed = train(proof.undisturbed, fresh=True)
        say(f"training through {proof.history}")
        disturbed = train(proof.disturbed, fresh=True, script=Stage(play, cluster))
    if play.left:
        raise SpecError(
            f"the run was over at step {disturbed.step} before it was the turn of {', '.join(map(str, play.left))}: "
            "give it more steps, or the history fewer events"
        )
    differences = compare(undisturbed, disturbed, proof)
    return {
        "equal": not differences,
        "history": str(proof.history),
        "undisturbed": {key: undisturbed.result[key] for key in TRAIN_KEYS},
        "disturbed": {key: disturbed.result[key] for key in TRAIN_KEYS},
        "events": events(play.acts, disturbed.url),
        "difference": "; ".join(differences) or None,
    }


def prepare(spec: TrainSpec, history: str) -> Proof:
    """Return the two runs that `history` asks for; starts nothing. Raises SpecError, DataError."""
    spec = resolve(spec, base=Path.cwd(), cwd=Path.cwd())
    if spec.workers.gpus:
        raise SpecError("verify trains with processes of this machine that share no GPU: --set workers.gpus=0")
    dataset = Dataset.open(spec.data.train, on_bad_shard=spec.data.on_bad_shard).select(spec.data.columns)
    plan = Plan.of(dataset, seed=spec.data.seed, global_batch=spec.data.global_batch, slots=spec.num_slots)
    steps = spec.budget.steps or (spec.budget.epochs or 0) * plan.steps_per_epoch
    found = parse_history(history, slots=plan.slots, steps=steps)
    folder = storage.join(spec.storage, f"{spec.name}-verify")
    threads = max(1, int(spec.workers.cpus))  # nodes have whole CPUs, and a worker computes with so many threads

    def changed(name: str, least: int, most: int) -> TrainSpec:
        workers = spec.workers.model_copy(update={"min": least, "max": most, "cpus": float(threads)})
        data = spec.data.model_copy(update={"slots": plan.slots})
        fixed = {"consistency": "bitwise", "audit": True, "name": name, "storage": folder}
        return spec.model_copy(update={**fixed, "workers": workers, "data": data})

    return Proof(
        history=found,
        plan=plan,
        steps=steps,
        undisturbed=changed("undisturbed", found.first, found.first),
        disturbed=changed("disturbed", 1, found.most),
    )


def compare(undisturbed: Run, disturbed: Run, proof: Proof) -> list[str]:
    """Return what differs between two runs that should be equal, the most telling first."""
    found = missing(disturbed.url, proof)
    line = first_difference(undisturbed.url, disturbed.url)
    found += [line] if line else []
    weights = [run.weights_sha256[:12] for run in (undisturbed, disturbed)]
    if undisturbed.weights_sha256 != disturbed.weights_sha256:
        found.append(f"weights_sha256 is {weights[0]}… undisturbed and {weights[1]}… disturbed")
    for name in sorted(set(undisturbed.metrics) | set(disturbed.metrics)):
        values = [run.metrics.get(name) for run in (undisturbed, disturbed)]
        if values[0] != values[1]:
            found.append(f"{name} is {values[0]} undisturbed and {values[1]} disturbed")
    return found


def missing(run: str, proof: Proof) -> list[str]:
    """Say where a run did not train on every sample exactly once an epoch, by its audit."""
    try:
        audit = read_steps(storage.join(run, "audit"))
    except FileNotFoundError:
        return ["the disturbed run left no audit"]
    epochs, rows = np.asarray(audit["epoch"]), np.asarray(audit["row"])
    found = []
    for epoch in range(-(-proof.steps // proof.plan.steps_per_epoch)):
        counts = np.bincount(rows[epochs == epoch], minlength=proof.plan.num_rows)
        whole = (epoch + 1) * proof.plan.steps_per_epoch <= proof.steps
        for text, wrong in (("twice", counts > 1), ("not at all", (counts < 1) & whole)):
            if wrong.any():
                which = ", ".join(map(str, np.flatnonzero(wrong)[:SHOWN_ROWS]))
                more = ", …" if wrong.sum() > SHOWN_ROWS else ""
                found.append(f"in epoch {epoch} {wrong.sum()} samples were trained on {text} (rows {which}{more})")
    return found


def first_difference(one: str, other: str) -> str | None:
    """Say where the audits of two runs differ first; None where their files are equal byte for byte."""
    folders = [storage.join(run, "audit") for run in (one, other)]
    files = [dict(_files(folder)) for folder in folders]
    if files[0] == files[1]:
        return None
    tables = [read_steps(folder).to_pydict() if file else {} for folder, file in zip(folders, files, strict=True)]
    lines = [list(zip(*table.values(), strict=True)) for table in tables]
    at = next((n for n, pair in enumerate(zip(*lines, strict=False)) if pair[0] != pair[1]), min(map(len, lines)))
    if at == max(map(len, lines)):
        return "the audits hold the same lines in files of other bytes"
    said = [_line(table, at) if at < len(table.get("step", ())) else "at its end" for table in tables]
    return f"line {at} of the audit is {said[0]} undisturbed and {said[1]} disturbed"


def events(acts: list[Act], run: str) -> list[dict[str, Any]]:
    """Return what each event after the first number did and what it cost, from what the script saw and the metrics.

    `recovery_s` of a loss runs from the signal to the end of the first step that had not been done before. Of a resize
    or a drain, which end no process at work, it is the longest time between the ends of two steps while it went on.
    """
    steps = read_steps(storage.join(run, "metrics")).to_pydict()
    ended = dict(zip(steps["step"], steps["ended"], strict=True))
    return [
        {
            "event": str(act.event),
            "kind": KINDS[act.event.word],
            "step": act.step,
            "recovery_s": _recovery_s(act, ended),
            "steps_redone": act.step - act.lowest,
            "workers": len(act.after) or None,
            "survivors": act.survivors,
            "survivors_kept": act.kept if act.after else None,
        }
        for act in acts[1:]
    ]


def as_text(found: Mapping[str, Any]) -> str:
    """Return a proof as plain text: the verdict, the two runs, and what each event cost."""
    if found["equal"]:
        verdict = "equal: the same samples in the same steps, each once an epoch, and the same weights to the bit"
    else:
        verdict = f"not equal: {found['difference']}"
    lines = [verdict, ""]
    for name in ("undisturbed", "disturbed"):
        run = found[name]
        cost = f"{run['step']} steps in {duration(run['wall_s'])}"
        lines.append(f"  {name:<12} {cost:<28} sha256 {run['weights_sha256'][:16]}…  {run['run']}")
    if found["events"]:
        lines += ["", f"  {'event':<10} {'at step':>8} {'back after':>12} {'redone':>8} {'workers':>8}  survivors"]
    for event in found["events"]:
        back = "—" if event["recovery_s"] is None else duration(event["recovery_s"])
        kept = "—" if event["survivors_kept"] is None else f"{event['survivors_kept']} of {event['survivors']} kept"
        numbers = f"{event['step']:>8} {back:>12} {event['steps_redone']:>8} {event['workers'] or '—':>8}"
        lines.append(f"  {event['event']:<10} {numbers}  {kept}")
    return "\n".join(lines)


def _remarks(spec: TrainSpec, proof: Proof) -> Iterator[str]:
    forced = ["consistency: bitwise"] if spec.consistency != "bitwise" else []
    forced += [] if spec.audit else ["audit: true"]
    if forced:
        yield f"whatever the spec says, verify trains with {' and '.join(forced)}: it proves to the bit"
    yield from proof.history.remarks()


def _files(folder: str) -> Iterator[tuple[str, bytes]]:
    try:
        for file in storage.list_files(folder, suffix=".parquet"):
            yield file.path, storage.read_bytes(storage.join(folder, file.path))
    except FileNotFoundError:
        return


def _line(table: Mapping[str, list[int]], at: int) -> str:
    return "(" + ", ".join(f"{name} {values[at]}" for name, values in table.items()) + ")"


def _recovery_s(act: Act, ended: Mapping[int, float]) -> float | None:
    if act.event.word in ("kill", "stop", "node"):
        first = next((step for step in sorted(ended) if step >= act.step and ended[step] > act.at), None)
        return None if first is None else ended[first] - act.at
    moments = sorted(ended.values())
    over = act.done if act.done is not None else float("inf")
    gaps = [later - earlier for earlier, later in pairwise(moments) if act.at < later <= over]
    return max(gaps, default=None)
