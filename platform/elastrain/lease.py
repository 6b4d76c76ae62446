"""One writer a folder on S3: a lease, which its owner renews, and which others take over once it does not.

The object `.lock` in the folder says who holds it: host, process, user, a random token and a counter that grows with
each write. It is written only by conditional writes, so of all that want it one gets it. Its owner renews it every
RENEW_S seconds. Its age is the time on the store's clock, never on ours, since it was last written. Who finds it older
than the lease that stands in it takes it over; so does at once who can see on this machine that the owner is dead. An
owner that ends writes that it is free: the object stays, since S3 has no removal that only hits one's own version.

What this guarantees, where the store honours conditional writes (`conditional.probe` looks each time a lease is taken):

- At any moment at most one token stands in the lock, and whoever takes it from another knows so.
- `Hold.check` raises if the token was taken over before it was called. Who was stopped for longer than its lease and
  goes on learns of it there; a renewal that fails because the store is away costs nothing as long as nobody takes over.
- No checkpoint of a run that was taken over comes into being once `training.manifests.revoke` has run: it makes the
  manifests that are missing impossible, and manifests are only created. A writer checks its hold between the files of
  a checkpoint and its manifest, so either `revoke` saw the files or the check fails.
- Nor is a checkpoint of its successor's harmed: the files of each writer have names of their own, and it removes no
  others but those of checkpoints that later ones have replaced.

- Nor is a dataset that was packed: shards of each writer have names of their own, and manifests are only created.

What it cannot: S3 has no write that depends on another object. Between a check and the write that follows, however
short, a hold can be lost. Records (metrics, audit, ledger) and what a start or a pack removes are checked just before;
what an owner writes that stood still in between still arrives. A manifest that is about to be replaced by its own run
is real, so `revoke` leaves it alone, and the replacement, whose files are whole, too, may still come.
"""

import getpass
import json
import os
import secrets
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastrain import conditional, storage
from elastrain.errors import ConflictError, StorageError
from elastrain.s3 import is_s3

LOCK = ".lock"
LEASE_S = 30.0
RENEW_S = 5.0
END_S = 20.0  # longer than a request may take


@dataclass(frozen=True, slots=True)
class Hold:
    """Who holds a folder, as plain data that goes to other processes; without a token nobody can tell."""

    folder: str
    token: str = ""

    def check(self) -> None:
        """Raise ConflictError if another one has taken the folder over, StorageError if the store does not answer."""
        if not self.token:
            return
        url = storage.join(self.folder, LOCK)
        try:
            there = _parsed(conditional.read(url).data if is_s3(url) else storage.read_bytes(url))
        except FileNotFoundError:
            there = {}
        token = there.get("token", self.token)
        if not there or there.get("free") or token != self.token:
            taken = f"was taken over by {_who(there)} while this process gave no sign"
            why = "its lock was given back or removed" if token == self.token else taken
            raise ConflictError(f"{self.folder}: {why}; this process stops, and what it had committed is kept")


class Lease:
    """A lock that is held and renewed, until `release`."""

    def __init__(self, folder: str, owner: dict[str, Any], etag: str) -> None:
        self.hold = Hold(folder, owner["token"])
        self._url, self._owner, self._etag = f"{folder}/{LOCK}", owner, etag
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="lease")
        self._thread.start()

    def release(self) -> None:
        """Say that the folder is free, unless another one has taken it over."""
        self._ended.set()
        self._thread.join(END_S)
        self._write(free=True)

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_S):
            if not self._write(free=False):
                return  # taken over: `Hold.check` tells whoever is about to write

    def _write(self, *, free: bool) -> bool:
        """Write the lock anew; say whether it is still ours, as far as the store answers."""
        try:
            while True:
                self._owner = {**self._owner, "counter": self._owner["counter"] + 1, "free": free}
                etag = conditional.replace(self._url, _bytes(self._owner), self._etag, patient=False)
                if etag is not None:
                    self._etag = etag
                    return True
                there = conditional.read(self._url, patient=False)  # perhaps a write of ours whose answer was lost
                if _parsed(there.data).get("token") != self._owner["token"]:
                    return False
                self._etag = there.etag
        except FileNotFoundError:
            return False
        except StorageError:
            return True  # the store is away: whoever takes over when it is back is seen then


def taken(folder: str, *, remedy: str) -> Lease:
    """Take the lease of a folder on S3.

    Raises ConflictError, naming the owner and ending in `remedy`, if another one holds it; StorageError if the store
    does not answer, or does not honour conditional writes.
    """
    folder = folder.rstrip("/")
    url, now = f"{folder}/{LOCK}", conditional.probe(folder)
    owner = {
        **identity(now),
        "counter": 1,
        "lease_s": LEASE_S,
        "machine": _machine(),
        "born": _born(os.getpid()),
        "free": False,
    }
    while True:  # ends: whoever wins instead of us is seen the next time, and has a lease
        try:
            there = conditional.read(url)
        except FileNotFoundError:
            etag = conditional.create(url, _bytes(owner))
        else:
            held = _parsed(there.data)
            idle_s = max(0.0, now - there.written)
            if not held.get("free") and idle_s < _number(held, "lease_s", LEASE_S) and not _is_dead(held):
                raise ConflictError(_refusal(folder, held, now, idle_s, remedy))
            owner["counter"] = int(_number(held, "counter", 0)) + 1
            etag = conditional.replace(url, _bytes(owner), there.etag)
        if etag is not None:
            return Lease(folder, owner, etag)


def identity(now: float) -> dict[str, Any]:
    """Return who this process is, with a new token, as one that holds a folder since `now`."""
    me = {"host": socket.gethostname(), "pid": os.getpid(), "user": _user()}
    return {**me, "token": secrets.token_hex(16), "since": now}


def _refusal(folder: str, held: dict[str, Any], now: float, idle_s: float, remedy: str) -> str:
    lease_s = _number(held, "lease_s", LEASE_S)
    since_s = max(0.0, now - _number(held, "since", now))
    return (
        f"{folder}: in use by {_who(held)}, for {since_s:.0f} s, its last sign {idle_s:.0f} s ago; wait for it, stop "
        f"it, or {remedy}; if it is dead, the same command takes over {lease_s:.0f} s after its last sign"
    )


def _who(held: dict[str, Any]) -> str:
    if not held.get("token"):
        return "another process"
    return f"process {held.get('pid')} of {held.get('user')} on {held.get('host')}"


def _is_dead(held: dict[str, Any]) -> bool:
    """Say whether the owner was a process of this machine and is none any more; False where nobody can tell."""
    return (
        bool(held.get("machine")) and held.get("machine") == _machine() and _born(held.get("pid")) != held.get("born")
    )


def _machine() -> str:
    """Return what tells this boot of a machine, and this container's processes, from all others; empty if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""


def _born(pid: object) -> str:
    """Return when a process of this machine was started, in ticks since the boot; empty if there is none (any more)."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if state in "ZX" else rest[18]


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container without this user in its list
        return str(os.getuid())


def _bytes(owner: dict[str, Any]) -> bytes:
    return json.dumps(owner).encode()


def _parsed(data: bytes) -> dict[str, Any]:
    """Return what a lock says; nothing, if it is not one of ours."""
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _number(held: dict[str, Any], name: str, default: float) -> float:
    value = held.get(name)
    return float(value) if isinstance(value, int | float) else default
