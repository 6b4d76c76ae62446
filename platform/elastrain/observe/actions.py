"""Who did what to the runs of a storage, and when: an entry an action, kept beside the runs and never written again.

```
<storage>/.actions/20261127T170000.123456Z-9f3a61c2.json    one line of JSON
```
On S3 an entry is created and nothing else, so a bucket's policy may forbid to replace and to delete what lies there.
The folder's name begins as no run's can, and `--fresh` leaves it alone. Who did it is what the machine says of its
user: who may write the storage may also lie in it.
"""

import contextlib
import getpass
import json
import os
import secrets
import socket
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from elastrain import conditional, storage
from elastrain.errors import StorageError
from elastrain.s3 import is_s3

FOLDER = ".actions"
ASKED_BY, JOB = "ELASTRAIN_ASKED_BY", "ELASTRAIN_JOB"
"""Variables by which a job on a cluster knows who submitted it, and its name."""

Action = dict[str, Any]
"""`at` (UTC, ISO 8601), `action` (submit, start, resume, stop, delete), `run` (its URL, or the dataset's that `pack
--overwrite` replaced), `user`, `host`, `pid`; beside that `attempt`, `step`, `job` where there is one, and `asked_by`,
USER@HOST, where a job does what somebody wanted."""


def note(run: str, action: str, *, patient: bool = True, **fields: Any) -> None:
    """Add an entry for a run, sweep or dataset at `run`, `<storage>/<name>`, to its storage's.

    Raises StorageError; where not `patient`, at the first failure of S3.
    """
    now = datetime.now(UTC)
    entry = {"at": now.isoformat(), "action": action, "run": run, **_who(), **fields}
    data = (json.dumps({key: value for key, value in entry.items() if value is not None}) + "\n").encode()
    name = f"{now:%Y%m%dT%H%M%S.%f}Z-{secrets.token_hex(4)}.json"
    url = storage.join(_storage_of(run), FOLDER, name)
    if is_s3(url):
        if conditional.create(url, data, patient=patient) is None:
            raise StorageError(f"{url}: another entry of this name is there; look at the clock of this machine")
        return
    storage.put(url, data)
    if storage.is_local(url):
        with contextlib.suppress(OSError):  # some mounted stores have no modes
            storage.local_path(url).chmod(0o444)


def read_actions(where: str) -> list[Action]:
    """Return the actions of a storage in the order of their times; none where there was none.

    Raises StorageError, also for a local folder that does not exist.
    """
    folder = storage.join(storage.absolute(where), FOLDER)
    if storage.is_local(where) and not storage.local_path(where).is_dir():
        raise StorageError(f"{where}: no such folder; give what the specs of runs call storage")
    try:
        files = storage.list_files(folder, suffix=".json")
    except FileNotFoundError:
        return []
    return [_entry(storage.join(folder, file.path)) for file in files]


def as_text(actions: Iterable[Mapping[str, Any]]) -> str:
    """Return actions as a table for people: when, who, what, and to which run."""
    rows = [
        (
            f"{each['at'][:19]}Z".replace("T", " "),
            each.get("asked_by") or f"{each['user']}@{each['host']}",
            each["action"],
            each["run"].rsplit("/", 1)[-1],
            ", ".join(f"{key} {each[key]}" for key in ("attempt", "step", "job") if key in each),
        )
        for each in actions
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(4)]
    lines = ("  ".join(f"{text:<{width}}" for text, width in zip(row, [*widths, 0], strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines) or "nobody has done anything here yet"


def asking() -> str:
    """Return who this is, as USER@HOST."""
    return f"{_user()}@{socket.gethostname()}"


def _who() -> dict[str, Any]:
    asked = {"asked_by": os.environ.get(ASKED_BY), "job": os.environ.get(JOB)}
    return {"user": _user(), "host": socket.gethostname(), "pid": os.getpid(), **asked}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def _storage_of(run: str) -> str:
    return run.rstrip("/").rpartition("/")[0] or "/"


def _entry(url: str) -> Action:
    found = storage.read_json(url)
    if not isinstance(found, dict) or not {"at", "action", "run", "user", "host"} <= found.keys():
        raise StorageError(f"{url}: not an entry of the actions of a storage; remove it")
    return found
