"""Snapshots outlive the driver and the workers of a run: an actor on another node than the driver's holds them.

The holder is detached and has a name made of the run's URL. The worker that leads makes it where there is a node for
it, and sends it a snapshot every few seconds. Whoever goes on with the run turns the newest whole one into a checkpoint
and ends the holder: each attempt begins without one, so who still works for an attempt before has nobody to send to.

Each attempt cuts audit and metrics back to where it begins, so a snapshot counts only as long as no other attempt has
begun since, on whatever cluster: it names its attempt, by the id of its host, and the ledger names the last one.
"""

import contextlib
import hashlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from elastrain.elastic.ray_inner import actor_id, autoscaler, draining_nodes
from elastrain.errors import ResourceError
from elastrain.observe.ledger import read_ledger
from elastrain.training.manifests import Description, adopt, newest_whole, unseal

NAMESPACE = "elastrain"
KEPT = 2
IDLE_S = 3600.0  # a holder to which nobody has spoken for so long ends itself
PAID_IDLE_S = 120.0  # sooner where an autoscaler would end its node, which costs as long as it stays
PIECE = 16 << 20  # bytes in a message: what an object store has to hold of a snapshot
ANSWER_S = 30.0  # a holder that takes longer for a message is as good as dead
LOOK_S = 5.0
END_S = 5.0


@dataclass(slots=True)
class Held:
    """A snapshot in memory: its files in pieces, by name. The manifest of one that is not whole is empty."""

    step: int
    attempt: str
    files: dict[str, list[bytes]] = field(default_factory=dict)
    descriptions: dict[str, Description] = field(default_factory=dict)
    manifest: bytes = b""

    def add(self, name: str, piece: bytes) -> None:
        """Take in the next piece of a file."""
        self.files.setdefault(name, []).append(piece)
        self.descriptions.setdefault(name, Description()).add(piece)


class Holder:
    """Holds the newest two whole snapshots of a run; while another one comes only the newest: never more than two."""

    def __init__(self, idle_s: float = IDLE_S) -> None:
        self._whole: list[Held] = []
        self._coming: dict[str, Held] = {}
        self._idle_s, self._heard = idle_s, time.monotonic()
        threading.Thread(target=self._end_when_idle, daemon=True).start()

    def begin(self, key: str, step: int, attempt: str) -> None:
        """Begin to take in a snapshot; `key` tells its pieces from those of another one that was given up."""
        self._heard = time.monotonic()
        self._whole = self._whole[1 - KEPT :]
        self._coming = {key: Held(step, attempt)}

    def add(self, key: str, name: str, piece: bytes) -> None:
        """Take in the next piece of a file; raises KeyError if another snapshot was begun."""
        self._heard = time.monotonic()
        self._coming[key].add(name, piece)

    def close(self, key: str, manifest: bytes) -> None:
        """Count a snapshot, if its files are those of its manifest; raises ValueError if not, KeyError as `add`."""
        self._heard = time.monotonic()
        held = self._coming.pop(key)
        arrived = {name: description.entry() for name, description in held.descriptions.items()}
        if unseal(manifest, held.step)["files"] != arrived:
            raise ValueError("not all that was sent has arrived")
        held.manifest = manifest
        self._whole.append(held)

    def node(self) -> str:
        """Return the id of the node that this is on."""
        return str(ray.get_runtime_context().get_node_id())

    def held(self) -> list[tuple[int, str, bytes]]:
        """Return step, attempt and manifest of each whole snapshot, the newest first."""
        self._heard = time.monotonic()
        return [(held.step, held.attempt, held.manifest) for held in reversed(self._whole)]

    def read(self, manifest: bytes, name: str, number: int) -> bytes | None:
        """Return a piece of a file of the snapshot with this manifest, None after its last one; raises KeyError."""
        self._heard = time.monotonic()
        pieces = {held.manifest: held.files for held in self._whole}[manifest][name]
        return pieces[number] if number < len(pieces) else None

    def _end_when_idle(self) -> None:
        while (left := self._heard + self._idle_s - time.monotonic()) > 0:
            time.sleep(left)
        os._exit(0)


class HolderVault:
    """The way of a worker to the run's holder: a `training.snapshot.Vault`. `host` is the attempt's."""

    def __init__(self, host: Any, run: str) -> None:
        self._host, self._run = host, run
        self._holder: Any = None
        self._node = ""  # where it is
        self._lock = threading.Lock()
        self._looks, self._closed = False, False
        self._next_look = 0.0

    def ready(self) -> bool:
        """See `Vault.ready`: a holder is looked for, made, or moved off a node that goes, in a thread."""
        if not self._looks and time.monotonic() >= self._next_look:
            self._looks, self._next_look = True, time.monotonic() + LOOK_S
            threading.Thread(target=self._look, daemon=True, name="holder").start()
        return self._holder is not None

    def put(self, step: int, files: Iterable[tuple[str, bytes]], manifest: Callable[[], bytes]) -> None:
        """See `Vault.put`; raises RayError if the holder is dead or slow, ResourceError if there is none."""
        holder, key = self._holder, uuid.uuid4().hex
        if holder is None:
            raise ResourceError("there is no holder")
        self._ask(holder.begin, key, step, actor_id(self._host))
        for name, data in files:
            for at in range(0, len(data), PIECE):
                self._ask(holder.add, key, name, data[at : at + PIECE])
        self._ask(holder.close, key, manifest())

    def close(self) -> None:
        """Make no holder any more: the run ends, and its driver ends the holder."""
        with self._lock:
            self._closed = True

    def _ask(self, method: Any, *arguments: Any) -> None:
        """Wait for a message to be taken in. One that is too slow is ended, so that another one can be made."""
        if self._closed:
            raise ResourceError("the run has ended")
        try:
            ray.get(method.remote(*arguments), timeout=ANSWER_S)
        except ray.exceptions.RayError as error:
            holder, self._holder = self._holder, None
            if isinstance(error, ray.exceptions.GetTimeoutError):
                ray.kill(holder)
            raise

    def _look(self) -> None:
        try:
            if self._holder is not None and self._node not in draining_nodes():
                return
            driver, busy = ray.get(self._host.nodes.remote(), timeout=ANSWER_S)
            node = node_for_holder(driver, busy)
            if node is None:
                return
            with self._lock:
                if self._closed:
                    return
                if self._holder is not None:  # it would keep its node, and go with it
                    self._holder = None
                    end_holder(self._run)
                holder = _made(self._run, node)
            self._node = ray.get(holder.node.remote(), timeout=ANSWER_S)
            self._holder = holder
        except (ray.exceptions.RayError, ValueError):  # looked for again in a while
            pass
        finally:
            self._looks = False


def node_for_holder(driver: str, busy: Sequence[str]) -> str | None:
    """Return a node other than the driver's, none of the `busy` ones if possible; None where there is no other."""
    draining = draining_nodes()
    alive = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]
    return min((node for node in alive if node != driver), key=lambda node: (node in busy, node), default=None)


def recall(
    run: str,
    plan: Mapping[str, Any],
    *,
    warn: Callable[[str], None],
    settle: Callable[[], None] = lambda: None,
) -> None:
    """Turn the newest whole snapshot of the run's last attempt into a checkpoint, if it is past those there are.

    The holder is ended. Raises StorageError if the checkpoint cannot be written, and what `settle` raises before it
    comes into being; the holder lives on then.
    """
    holder = _found(run)
    if holder is None:
        return
    held = []
    with contextlib.suppress(ray.exceptions.RayError):
        held = ray.get(holder.held.remote(), timeout=ANSWER_S)
    attempt = next((r.get("id") for r in reversed(read_ledger(run)) if r["kind"] == "start"), None) if held else None
    own = [(step, manifest) for step, made_in, manifest in held if made_in == attempt]
    newest = (newest_whole(run, warn=lambda _: None) or 0) if own else 0
    for step, manifest in own:
        if step <= newest:
            break
        try:
            if unseal(manifest, step)["info"]["plan"] == dict(plan):
                adopt(run, step, manifest, partial(_pieces, holder, manifest), settle)
                warn(f"going on from a snapshot of step {step}")
                break
        except (ValueError, ray.exceptions.RayError) as error:
            warn(f"the snapshot of step {step} is passed over: {error}")
    end_holder(run)


def end_holder(run: str) -> None:
    """End the run's holder, if there is one, and wait until its name is free."""
    deadline = time.monotonic() + END_S
    with contextlib.suppress(ray.exceptions.RayError):
        while (holder := _found(run)) is not None and time.monotonic() < deadline:
            ray.kill(holder)
            time.sleep(0.02)


def holder_name(run: str) -> str:
    """Return the name under which Ray knows the holder of a run."""
    return f"snapshots-{hashlib.sha256(run.encode()).hexdigest()[:16]}"


def _found(run: str) -> Any:
    try:
        return ray.get_actor(holder_name(run), namespace=NAMESPACE)
    except (ValueError, ray.exceptions.RayError):
        return None


def _made(run: str, node: str) -> Any:
    remote: Any = ray.remote(Holder)
    return remote.options(
        name=holder_name(run),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    ).remote(IDLE_S if autoscaler() is None else PAID_IDLE_S)


def _pieces(holder: Any, manifest: bytes, name: str) -> Iterator[bytes]:
    number = 0
    while (piece := ray.get(holder.read.remote(manifest, name, number), timeout=ANSWER_S)) is not None:
        yield piece
        number += 1
