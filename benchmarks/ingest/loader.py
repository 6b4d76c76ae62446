"""torch's DataLoader over row groups, in its fastest form: the data set yields whole batches; optionally shuffled."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from benchmarks.ingest.data import BATCH, Meter, files, groups, rows_of, tensors
from benchmarks.ingest.result import combined
from benchmarks.script import finish, in_ranks, options
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

BUFFER_GROUPS = 32  # row groups that are mixed at a time


class RowGroups(IterableDataset[tuple[Tensor, Tensor]]):
    """Batches of this rank's and loader worker's row groups, for ever; with `shuffle`, mixed 32 groups at a time."""

    def __init__(self, given: dict[str, Any], rank: int) -> None:
        self.given, self.rank = given, rank

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of up to 256 rows."""
        info = get_worker_info()
        place, count = (info.id, info.num_workers) if info else (0, 1)
        rank, size = self.rank + self.given["consumers"] * place, self.given["consumers"] * count
        pieces = self._mixed if self.given["shuffle"] else self._plain
        while True:
            yield from pieces(rank, size)

    def _plain(self, rank: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for file, group in groups(files(self.given["url"]), rank, size):
            yield from _cut(*tensors(file.read_row_group(group, columns=["image", "label"], use_threads=False)))

    def _mixed(self, rank: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = np.random.default_rng(rank)
        held: list[tuple[Tensor, Tensor]] = []
        for file, group in groups(files(self.given["url"]), rank, size):
            held.append(tensors(file.read_row_group(group, columns=["image", "label"], use_threads=False)))
            if len(held) == BUFFER_GROUPS:
                yield from _shuffled(held, generator)
                held = []
        if held:
            yield from _shuffled(held, generator)


def _cut(image: Tensor, label: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for first in range(0, len(label), BATCH):
        yield image[first : first + BATCH], label[first : first + BATCH]


def _shuffled(held: list[tuple[Tensor, Tensor]], generator: np.random.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    image, label = (torch.cat(parts) for parts in zip(*held, strict=True))
    order = torch.from_numpy(generator.permutation(len(label)))
    for places in order.split(BATCH):
        yield image[places], label[places]


def consume(rank: int, given: dict[str, Any]) -> dict[str, Any]:
    """Take batches from the loader; return what the meter measured."""
    torch.set_num_threads(1)
    workers = given["workers"]
    meter = Meter(rows=rows_of(given["url"], rank, given["consumers"]), epochs=given["epochs"], root=given["root"])
    loader = DataLoader(
        RowGroups(given, rank), batch_size=None, num_workers=workers, prefetch_factor=8 if workers else None
    )
    for image, label in loader:
        meter.take(image, label)
        if meter.done:
            break
    return {"measures": meter.measures(), "counters": {}, "digest": meter.digest}


def main() -> None:
    """Run one process a consumer."""
    given = {**options(), "root": os.getpid()}
    measures, counters, _ = combined(in_ranks(given["consumers"], consume, given))
    finish(measures, counters)


if __name__ == "__main__":
    main()
