"""The data of the ingest case, what a consumer measures, and the rows that the peers read."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from benchmarks.script import tree_cpu_s
from torch import Tensor

from elastrain import storage
from elastrain.data.chunks import PackOptions
from elastrain.data.columns import Column
from elastrain.data.dataset import MANIFEST, Dataset, fingerprint
from elastrain.data.shards import ShardWriter

PIXELS = 784
COLUMNS = (Column(name="image", dtype="uint8", shape=(28, 28)), Column(name="label", dtype="uint8", shape=()))
BATCH = 256
PIECE = 4096
WARM = 4  # epochs until pipelines are full and pages of the object store have been touched once


def prepare(folder: Path, *, rows: int, codec: str) -> str:
    """Pack images like MNIST's (a fifth of the pixels is ink) with our own writer; return the dataset's folder."""
    url = str(folder / f"images-{rows}-{codec}")
    return pack_images(url, rows=rows, options=PackOptions(codec=codec, shard_bytes=32 << 20))


def pack_images(url: str, *, rows: int, options: PackOptions) -> str:
    """Pack the images into a folder, unless they are there; return the folder."""
    if storage.exists(storage.join(url, MANIFEST)):
        return url
    with ShardWriter(url, COLUMNS, options) as writer:
        for first in range(0, rows, PIECE):
            writer.write(_images(first, min(PIECE, rows - first)))
        shards, columns = writer.finish()
    whole = Dataset(
        url=url,
        columns=columns,
        shards=shards,
        fingerprint=fingerprint(columns, shards),
        packed=True,
        key=options.encrypt,
    )
    storage.put_json(storage.join(url, MANIFEST), whole.manifest())
    return url


def _images(first: int, rows: int) -> dict[str, npt.NDArray[Any]]:
    """Return rings of different place, size and thickness: a fifth ink, soft edges, as in MNIST."""
    generator = np.random.default_rng(first)
    low, high = np.array([11, 11, 0.5, 0.5, 1.0]), np.array([17, 17, 1.2, 1.2, 2.5])
    drawn = generator.uniform(low[:, None], high[:, None], (5, rows)).astype(np.float32)
    y, x, height, width, thick = drawn[:, :, None, None]
    rows_of, columns_of = np.mgrid[:28, :28].astype(np.float32)
    distance = np.hypot((rows_of - y) / height, (columns_of - x) / width)
    ink = (thick - np.abs(distance - 8)) * 160 + generator.integers(-20, 20, distance.shape).astype(np.float32)
    images = np.where(thick < np.abs(distance - 8), 0, ink).clip(0, 255).astype(np.uint8)
    return {"image": images, "label": generator.integers(0, 10, rows, dtype=np.uint8)}


class Meter:
    """Takes batches as a training would: WARM epochs, `epochs` that are timed, and one that is digested."""

    def __init__(self, *, rows: int, epochs: int, root: int, start: float | None = None) -> None:
        self.start = time.perf_counter() if start is None else start
        self.first_s = 0.0
        self.digest = 0
        self.rows = 0
        self._begin, self._end, self._last = (rows * count for count in (WARM, WARM + epochs, WARM + epochs + 1))
        self._root = root
        self._moments: list[tuple[float, float, int]] = []
        self._weights = np.random.default_rng(7).integers(1, 2**63, PIXELS // 8, dtype=np.uint64)

    @property
    def done(self) -> bool:
        """Whether all epochs are through."""
        return self.rows >= self._last

    def take(self, image: Tensor, label: Tensor) -> None:
        """Count a batch, and digest it if it is of the last epoch."""
        if not self.rows:
            self.first_s = time.perf_counter() - self.start
        if self.rows >= self._end:
            self.digest = (self.digest + self._hash(image, label)) % 2**64
        self.rows += len(label)
        if len(self._moments) < 2 and self.rows >= (self._end if self._moments else self._begin):
            self._moments.append((time.perf_counter(), tree_cpu_s(self._root), self.rows))

    def measures(self) -> dict[str, float]:
        """Return rows a second and CPU seconds a million rows over the timed epochs, and seconds to the first batch."""
        (begin, cpu_before, rows_before), (end, cpu_after, rows_after) = self._moments
        rows = rows_after - rows_before
        return {
            "rows_per_s": rows / (end - begin),
            "cpu_s_per_million_rows": (cpu_after - cpu_before) / rows * 1e6,
            "first_batch_s": self.first_s,
            "begin": begin,
            "end": end,
        }

    def _hash(self, image: Tensor, label: Tensor) -> int:
        """Return a sum over rows: equal for equal multisets of samples, whatever their order."""
        with np.errstate(over="ignore"):
            words = np.ascontiguousarray(image.numpy()).reshape(len(image), PIXELS).view(np.uint64)
            row = (words * self._weights).sum(axis=1) + label.numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            row = (row ^ (row >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            return int((row ^ (row >> np.uint64(32))).sum())


def files(url: str) -> list[str]:
    """Return the dataset's Parquet files in order."""
    return [storage.join(url, shard.path) for shard in Dataset.open(url).shards]


def rows_of(url: str, rank: int, size: int) -> int:
    """Return the rows of a rank's row groups, which `groups` yields."""
    return int(Dataset.open(url).group_rows[rank::size].sum())


def tensors(batch: "pa.RecordBatch | pa.Table") -> tuple[Tensor, Tensor]:
    """Return image and label of a piece of the files as tensors over Arrow's memory."""
    image, label = batch.column("image"), batch.column("label")
    if isinstance(image, pa.ChunkedArray):
        image, label = image.combine_chunks(), label.combine_chunks()
    if isinstance(image, pa.ChunkedArray):
        image, label = pa.concat_arrays(image.chunks), pa.concat_arrays(label.chunks)
    data = np.frombuffer(image.buffers()[1], np.uint8, len(image) * PIXELS, image.offset * PIXELS)
    return torch.from_numpy(data.reshape(-1, 28, 28)), torch.from_numpy(label.to_numpy())


def groups(paths: list[str], rank: int, size: int) -> Iterator[tuple[pq.ParquetFile, int]]:
    """Yield this rank's row groups, every `size`-th, with page checksums verified; each file is opened once."""
    place = 0
    for path in paths:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                if place % size == rank:
                    yield file, group
                place += 1
