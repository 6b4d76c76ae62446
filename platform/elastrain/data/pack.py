"""`pack`: any source becomes `OUT/<split>` of Parquet shards and a manifest, as one Ray Data job in bounded memory.

```
source ─► chunks ─► read tasks (Ray Data, parallel, in order) ─► pieces ─► ShardWriter ─► shards ─► manifests
```
What a task does depends on its chunk alone, and pieces are put together in the order of chunks, so the number of CPUs
and tasks changes nothing. Errors travel as rows, not as exceptions: a user sees our sentence, not Ray's traceback.
"""

import logging
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray._private.utils import get_num_cpus
from ray.data import DataContext, ExecutionOptions, ExecutionResources
from ray.exceptions import NodeDiedError, OutOfDiskError, OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError

from elastrain import storage
from elastrain.data import outcome
from elastrain.data.chunks import Arrays, PackOptions, Reader, Split
from elastrain.data.columns import from_table, to_table
from elastrain.data.dataset import Dataset, fingerprint
from elastrain.data.shards import ShardWriter
from elastrain.data.sources import identity, open_source, parquet_files, refuse_credentials
from elastrain.data.tokens import Windows
from elastrain.errors import DataError, ElastrainError, ResourceError, StorageError, error_named
from elastrain.keys import check_key
from elastrain.lock import locked

PACK_FORMAT = 1  # one more whenever the same source and options give other bytes than before
BLOCK_BYTES = 32 << 20  # how many bytes of pieces a task hands over at once
IN_FLIGHT_BYTES = 64 << 20  # for each CPU, what may lie between the tasks and the writer
LEAST_CPUS = 2  # one to read while the other writes
EMPTY = pa.py_buffer(b"")
Progress = Callable[[str, int, int | None], None]
SCHEMA = pa.schema(
    {
        "chunk": pa.int64(),
        "piece": pa.int64(),
        "error": pa.string(),
        "message": pa.string(),
        "data": pa.large_binary(),
    }
)


def pack_dataset(source: str, out: str, options: PackOptions, *, progress: Progress | None = None) -> dict[str, Any]:
    """Pack `source` into `OUT/train` and, where there is a split, `OUT/test`; Ray must be initialised by the caller.

    Args:
        source: `digits`, `idx:DIR`, `csv:PATH`, `parquet:PATH`, `text:GLOB` or `images:DIR`.
        out: A folder or any fsspec URL. A pack of the same source and options that is there already is kept; what a
            killed one left, or what lacks a shard, is done again. A dataset that is there stays until the new one is
            whole.
        options: How to pack.
        progress: Called with the split, its rows so far, and all its rows where they are known before.

    Returns:
        `dataset`, `splits` (rows, bytes, shards and fingerprint of each), `columns`, `already` and `wall_s`.

    Raises:
        SpecError: There is no such kind of source, or a URL holds credentials.
        DataError: The source is missing, broken, or does not fit in columns of numbers.
        ConflictError: `out` holds something else and `options.overwrite` is not set, holds the source itself, or is
            being packed into by another process.
        StorageError: Reading or writing failed; a full disk included, or a key that is not there.
        ResourceError: A task died, most likely for lack of memory.
    """
    begin = time.monotonic()
    refuse_credentials("OUT", out)
    out = storage.absolute(out)
    if options.encrypt is not None:
        check_key(options.encrypt)
    marker = {"format": PACK_FORMAT, **identity(source), "options": options.identity()}
    done = None if options.overwrite else outcome.finished(out, outcome.find(out), marker)
    already = done is not None
    if done is None:
        with locked(out, remedy="choose another folder"):
            done = _pack(source, out, options, marker, progress)
    return {**_result(out, done), "already": already, "wall_s": time.monotonic() - begin}


def _pack(
    source: str, out: str, options: PackOptions, marker: Mapping[str, Any], progress: Progress | None
) -> dict[str, Dataset]:
    there = outcome.find(out)
    outcome.refuse_others(out, there, marker, overwrite=options.overwrite)
    if there:
        outcome.refuse_own_source(out, there, parquet_files(source))
    splits = open_source(source, options)
    with outcome.placed(out, there, splits, marker) as place:
        packed = {
            name: _pack_split(source, place.shards(name), name, split, options, progress)
            for name, split in splits.items()
        }
        return outcome.commit(place, packed)


def machine_cpus() -> int:
    """Return the CPUs of an embedded Ray that packs: all that this machine, or its container, gives us."""
    return max(LEAST_CPUS, int(get_num_cpus(override_docker_cpu_warning=True)))


def _result(out: str, done: Mapping[str, Dataset]) -> dict[str, Any]:
    splits = {
        name: {"rows": d.num_rows, "bytes": d.size_bytes, "shards": len(d.shards), "fingerprint": d.fingerprint}
        for name, d in done.items()
    }
    columns = {
        c.name: {"dtype": c.dtype, "shape": list(c.shape), "num_values": c.num_values, "mean": c.mean, "std": c.std}
        for c in next(iter(done.values())).columns
    }
    return {"dataset": out, "splits": splits, "columns": columns}


def _pack_split(
    source: str, url: str, name: str, split: Split, options: PackOptions, progress: Progress | None
) -> Dataset:
    windows = Windows(split.window) if split.window is not None else None
    with ShardWriter(url, split.columns, options) as writer:
        for arrays in _pieces(split):
            writer.write({"tokens": windows.push(arrays["tokens"])} if windows else arrays)
            if progress is not None:
                progress(name, writer.rows, split.rows)
        shards, columns = writer.finish()
    if not writer.rows:
        raise DataError(f"{source}: the {name} split has no rows; give more data, or another --test-fraction")
    return Dataset(
        url=url,
        columns=columns,
        shards=shards,
        fingerprint=fingerprint(columns, shards),
        packed=True,
        key=options.encrypt,
        info={**split.info, **({"dropped_tokens": windows.dropped} if windows else {})},
    )


def _pieces(split: Split) -> Iterator[Arrays]:
    """Yield what the reader makes of each chunk, in order, computed by parallel tasks; raises what they raised."""
    order = _Order()
    try:
        for batch in _batches(split):
            for row in range(batch.num_rows):
                chunk, piece, error, message = (batch.column(c)[row].as_py() for c in range(4))
                if error:
                    raise error_named(error, message)
                data = batch.column("data")[row].as_buffer()
                if order.expect(chunk, piece, end=not len(data)):
                    yield from_table(pa.ipc.open_stream(data).read_all(), where=f"chunk {chunk}")
    except RayError as error:
        raise _sentence(error) from None
    order.complete(len(split.chunks))


class _Order:
    """Holds the stream of pieces to the order of the chunks: no option of Ray Data can make another dataset."""

    def __init__(self) -> None:
        self.next = (0, 0)

    def expect(self, chunk: int, piece: int, *, end: bool) -> bool:
        """Check the next piece, or the end of a chunk; return whether it is a piece."""
        if (chunk, piece) != self.next:
            raise RuntimeError(f"Ray Data gave piece {(chunk, piece)} where {self.next} was due")
        self.next = (chunk + 1, 0) if end else (chunk, piece + 1)
        return not end

    def complete(self, chunks: int) -> None:
        """Check that every chunk ended."""
        if self.next != (chunks, 0):
            raise RuntimeError(f"Ray Data ended before {self.next}; {chunks} chunks were due")


def _batches(split: Split) -> Iterator[Any]:
    """Run the job; yield tables of `SCHEMA` as the tasks make them."""
    if not split.chunks:
        return
    context = DataContext.get_current().copy()
    context.enable_progress_bars = context.enable_operator_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = BLOCK_BYTES
    cpus = int(ray.cluster_resources().get("CPU", 1))
    limits = ExecutionResources(object_store_memory=IN_FLIGHT_BYTES * (cpus + 2))
    context.execution_options = ExecutionOptions(preserve_order=True, resource_limits=limits)
    work = [{"place": place, "chunk": pickle.dumps(chunk)} for place, chunk in enumerate(split.chunks)]
    with DataContext.current(context):
        source = ray.data.from_items(work, override_num_blocks=len(work))
        data = source.map_batches(_Read(split.reader), batch_size=1, batch_format="pyarrow")
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # what the user needs to know is in our errors
    try:
        yield from data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)
    finally:
        logger.setLevel(level)


class _Read:
    """What a task does: read its chunk, and hand over pieces, then their end, or the error that stopped it."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __call__(self, work: Any) -> Iterator[Any]:
        for place, chunk in zip(work["place"].to_pylist(), work["chunk"].to_pylist(), strict=True):
            piece = 0
            try:
                for arrays in self.reader.read(pickle.loads(chunk)):  # noqa: S301 -- we pickled it
                    yield _row(place, piece, data=_stored(arrays))
                    piece += 1
            except ElastrainError as error:
                yield _row(place, piece, error=type(error).__name__, message=str(error))
            else:
                yield _row(place, piece)


def _row(place: int, piece: int, *, error: str = "", message: str = "", data: Any = EMPTY) -> Any:
    offsets = pa.py_buffer(np.array([0, data.size], np.int64))
    binary = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets, data])  # no copy of the rows
    return pa.table([[place], [piece], [error], [message], binary], schema=SCHEMA)


def _stored(arrays: Arrays) -> Any:
    table = to_table(arrays)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue()


def _sentence(error: RayError) -> BaseException:
    """Return what a failure of Ray means for the user; a bug of ours comes back as it was raised."""
    cause: BaseException | None = error
    while isinstance(cause, RayTaskError):
        cause = cause.cause
    if isinstance(cause, ElastrainError):
        return cause
    if isinstance(cause, OutOfDiskError):
        return StorageError("cannot pack: Ray's disk for spilled objects is full; free space there")
    if isinstance(cause, OutOfMemoryError | WorkerCrashedError | NodeDiedError):
        return ResourceError(
            "a task of the pack died, most likely for lack of memory; give Ray fewer CPUs or more memory"
        )
    return cause or error
