"""Folders of runs, sweeps and sources: which places lie on a machine, and whether all of a cluster's see them."""

import os
import socket
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from elastrain import storage
from elastrain.cluster.environment import LOCAL_HEAD
from elastrain.errors import SpecError
from elastrain.urls import table_kind


def local_folders(places: Iterable[str]) -> dict[str, Path]:
    """Return which of the places (paths, URLs, tables) are folders of a machine, and those folders."""
    paths = {place: place.removeprefix(f"{table_kind(place)}:") for place in places}
    return {place: _folder(path) for place, path in paths.items() if storage.is_local(path)}


def more_machines(hosts: Collection[str], nodes: Collection[str], *, managed: bool) -> str | None:
    """Say which machines beside this one a cluster has or may have; None where it is this one alone.

    `hosts` are the names of its machines and `nodes` the ids of its Ray nodes; `managed` says whether an autoscaler
    started any. What `elastrain cluster local` holds starts its nodes on this machine.

    >>> more_machines([socket.gethostname()], ["00"], managed=False)
    >>> more_machines([socket.gethostname()], ["00"], managed=True)
    "the cluster's autoscaler may start others"
    """
    if others := sorted(set(hosts) - {socket.gethostname()}):
        return f"{others[0]} is in the cluster, too"
    return "the cluster's autoscaler may start others" if managed and LOCAL_HEAD not in nodes else None


def refuse_unseen(places: Iterable[str], others: str | None, shared: Sequence[str]) -> None:
    """Raise SpecError for a place that is a folder and that not all machines see; all have mounted those `shared`.

    `others` is what `more_machines` says.
    """
    known = [_folder(folder) for folder in shared]
    for place, folder in local_folders(places).items():
        if others and not any(folder.is_relative_to(each) for each in known):
            raise SpecError(
                f"{place} is a folder of this machine, and {others}; give a URL such as s3://bucket/{folder.name}, "
                "or say --shared FOLDER if all its machines have that folder mounted"
            )


def _folder(path: str) -> Path:
    return Path(os.path.normpath(storage.absolute(path)))
