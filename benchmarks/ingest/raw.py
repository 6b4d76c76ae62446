"""The physical limit: a loop over `ParquetFile`, page checksums verified, tensors over Arrow's memory; no shuffle."""

import os
from typing import Any

from benchmarks.ingest.data import BATCH, Meter, files, groups, rows_of, tensors
from benchmarks.ingest.result import combined
from benchmarks.script import finish, in_ranks, options


def consume(rank: int, given: dict[str, Any]) -> dict[str, Any]:
    """Read the row groups of a rank, again and again; return what the meter measured."""
    size, paths = given["consumers"], files(given["url"])
    meter = Meter(rows=rows_of(given["url"], rank, size), epochs=given["epochs"], root=given["root"])
    read = 0
    while not meter.done:
        for file, group in groups(paths, rank, size):
            read += 1
            for batch in file.iter_batches(
                given["batch"], row_groups=[group], columns=["image", "label"], use_threads=False
            ):
                image, label = tensors(batch)
                for first in range(0, len(label), BATCH):
                    meter.take(image[first : first + BATCH], label[first : first + BATCH])
    counters = {"rows": meter.rows, "row_groups_read": read}
    return {"measures": meter.measures(), "counters": counters, "digest": meter.digest}


def main() -> None:
    """Run one process a consumer."""
    given = {**options(), "root": os.getpid()}
    finish(*combined(in_ranks(given["consumers"], consume, given)))


if __name__ == "__main__":
    main()
