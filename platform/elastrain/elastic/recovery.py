"""What losses and changes of members cost, from what the membership sees: each becomes one event of the ledger.

```
death ─ detect ─► noticed ─ agree ─► generation formed ─ connect ─► ─ state ─► ─ step ─► first step that is new
```
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from elastrain.elastic.protocol import Generation, Position, Worker


@dataclass(slots=True)
class Loss:
    """A member that is gone: why, since when, and when that was known (seconds of the membership's clock)."""

    worker: Worker
    why: str
    since: float
    known: float


@dataclass(slots=True)
class Recovery:
    """From one generation to the first step of the next; `event(kind, fields)` gets what it came to."""

    event: Callable[[str, Mapping[str, Any]], None]
    generation: int = 0
    members: tuple[str, ...] = ()
    drained: set[str] = field(default_factory=set)
    begun: bool = False  # some worker has had the state
    _losses: list[Loss] = field(default_factory=list)
    _before: tuple[str, ...] = ()
    _positions: dict[str, tuple[Position | None, bool]] = field(default_factory=dict)
    _entered: float | None = None  # when the first member came
    _formed: float = 0.0
    _left_behind: Position | None = None  # the most advanced position of the generation before
    _redone: int = 0
    _parts: tuple[float, float] = (0.0, 0.0)
    _ready: float = 0.0
    _pending: bool = False

    def lost(self, worker: Worker, why: str, since: float, now: float) -> None:
        """Note that a member is gone."""
        self._losses.append(Loss(worker, why, since, now))

    def entered(self, name: str, position: Position | None, now: float, *, failed: bool) -> None:
        """Note that a member came to the end of its generation, with its position."""
        self._entered = now if self._entered is None else self._entered
        self._positions[name] = (position, failed)
        self.begun = self.begun or position is not None

    def formed(self, generation: Generation, now: float) -> None:
        """Note the next generation. If the one before made no new step, what it was to recover from goes on."""
        if not self._pending:
            self._before = self.members
        found = [(position, failed) for position, failed in self._positions.values() if position is not None]
        best = max((position for position, _ in found), default=None)
        if best is not None or not self._pending:
            self._left_behind = best
        self._redone = int(bool(found) and all(failed for position, failed in found if position == best))
        self.generation = generation.number
        self.members = tuple(member.worker.name for member in generation.members)
        self._formed, self._positions, self._pending = now, {}, bool(self._before)

    def is_stored(self, stored: Position | None) -> bool:
        """Say whether storage holds all that the members had: they came in good order, and no further than that.

        Where nobody has had the state yet, all of it is still there.
        """
        if not self.begun:
            return True
        return not self.has_losses() and stored is not None and stored >= (self._left_behind or stored)

    def has_begun(self) -> bool:
        """Say whether any generation came so far that all its members had a state."""
        return self._ready > 0.0

    def has_losses(self) -> bool:
        """Say whether members are gone since the last new step."""
        return bool(self._losses)

    def ready(self, now: float, connect_s: float, state_s: float) -> None:
        """Note that the group is connected and all its members have the state."""
        self._ready, self._parts, self.begun = now, (connect_s, state_s), True

    def stepped(self, now: float) -> None:
        """Note the end of the first new step: what happened before is over, and told."""
        if self._pending:
            step = (self._left_behind or (0, 0))[0]
            for loss in self._losses:
                self.event("worker_lost", self._told(loss, step, now))
            self._tell_change(step, now)
        self._losses, self._entered, self._pending = [], None, False
        self._before = self.members

    def _told(self, loss: Loss, step: int, now: float) -> dict[str, Any]:
        connect_s, state_s = self._parts
        return {
            "worker": loss.worker.name,
            "node": loss.worker.node,
            "why": loss.why,
            "step": step,
            "recovery_s": now - loss.since,
            "steps_redone": self._redone,
            "detect_s": loss.known - loss.since,
            "agree_s": self._formed - loss.known,
            "connect_s": connect_s,
            "state_s": state_s,
            "step_s": now - self._ready,
            "workers": len(self.members),
        }

    def _tell_change(self, step: int, now: float) -> None:
        lost = {loss.worker.name for loss in self._losses}
        left = set(self._before) - set(self.members) - lost
        joined = set(self.members) - set(self._before)
        if not left and not joined:
            return
        since = self._formed if self._entered is None else self._entered
        preempted = sorted(left & self.drained)
        self.event(
            "preemption" if preempted else "resize",
            {
                "step": step,
                "before": len(self._before),
                "workers": len(self.members),
                "left": sorted(left),
                "joined": sorted(joined),
                "pause_s": self._ready - since,
                "recovery_s": now - since,
                "steps_redone": 0,
            },
        )
