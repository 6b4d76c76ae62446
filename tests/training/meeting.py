"""Real groups of processes that know nothing of each other but a folder, in which they meet."""

import threading
import time
from pathlib import Path

import torch

from elastrain.elastic.door import Door
from elastrain.elastic.protocol import Generation, Member, Worker
from elastrain.training.reduce import Group

TOKEN = b"the members of a test"
MEET_S = 120.0


def meet(folder: Path, rank: int, size: int, number: int = 1) -> Group:
    """Return the group of generation `number` as rank `rank` of `size` sees it, once all are there."""
    door = Door("127.0.0.1", TOKEN)
    _tell(folder / f"door-{number}-{rank}", door.address[1])
    ports = [_told(folder / f"door-{number}-{other}") for other in range(size)]
    workers = [Worker(name=f"w{r}", node="n", place=r, door=("127.0.0.1", port)) for r, port in enumerate(ports)]
    members = tuple(Member(worker=worker, position=(0, 0)) for worker in workers)
    generation = Generation(number=number, members=members, source=0)
    return door.join(generation, f"w{rank}", torch.device("cpu"), threading.Event())


def _tell(place: Path, port: int) -> None:
    new = place.with_suffix(".new")
    new.write_text(str(port))
    new.replace(place)


def _told(place: Path) -> int:
    deadline = time.monotonic() + MEET_S
    while not place.exists():
        assert time.monotonic() < deadline, f"nobody came to {place}"
        time.sleep(0.005)
    return int(place.read_text())
