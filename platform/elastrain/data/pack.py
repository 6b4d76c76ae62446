"""`pack`: any source becomes `OUT/<split>` of Parquet shards and a manifest, as one Ray Data job in bounded memory.

```
source ─► chunks ─► read tasks (Ray Data, parallel, in order) ─► pieces ─► ShardWriter ─► shards ─► manifests
              └───► hashes of rows, before, where duplicates are looked for ───┘
```
What a task does depends on its chunk alone, and pieces are put together in the order of chunks, so the number of CPUs
and tasks changes nothing. Errors travel as rows, not as exceptions: a user sees our sentence, not Ray's traceback.
"""

import contextlib
import json
import logging
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass, replace
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
from elastrain.data.card import Removals, check_labels, duplicates_found, label_of, make_card
from elastrain.data.chunks import Arrays, PackOptions, Reader, Removed, Split
from elastrain.data.columns import from_table, to_table
from elastrain.data.dataset import Dataset, fingerprint
from elastrain.data.duplicates import KEY, HashReader, RowHashes
from elastrain.data.lakes import pinned
from elastrain.data.near_duplicates import Alike, SignatureReader
from elastrain.data.no_demand import ask_nothing
from elastrain.data.shards import ShardWriter
from elastrain.data.sources import identity, open_source, parents, parquet_files, refuse_credentials
from elastrain.data.tokens import DocumentReader, Windows
from elastrain.errors import DataError, ElastrainError, ResourceError, StorageError, error_named
from elastrain.keys import check_key
from elastrain.lease import Hold
from elastrain.lock import locked
from elastrain.observe import actions
from elastrain.urls import table_kind

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
        source: `digits`, `idx:DIR`, `csv:PATH`, `parquet:PATH`, `text:GLOB`, `images:DIR`, `hf:DIR`,
            `delta:PATH[@VERSION]` or `iceberg:PATH[@SNAPSHOT]`.
        out: A folder or any fsspec URL. A pack of the same source and options that is there already is kept; what a
            killed one left, or what lacks a shard, is done again. A dataset that is there stays until the new one is
            whole, and if then the pack is killed, the next one brings the new one into its place.
        options: How to pack.
        progress: Called with the split, its rows so far, and all its rows where they are known before.

    Returns:
        `dataset`, `splits` (rows, bytes, shards and fingerprint of each), `columns`, `cards` (of each split), `already`
        and `wall_s`.

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
    source = pinned(source) if table_kind(source) else source
    if options.encrypt is not None:
        check_key(options.encrypt)
    marker = {"format": PACK_FORMAT, **identity(source), "options": options.identity()}
    done = None if options.overwrite else outcome.finished(out, outcome.find(out), marker)
    already = done is not None
    if done is None:
        with locked(out, remedy="choose another folder") as hold:
            done = _pack(source, hold, options, marker, progress)
    return {**_result(out, done), "already": already, "wall_s": time.monotonic() - begin}


def _pack(
    source: str, hold: Hold, options: PackOptions, marker: Mapping[str, Any], progress: Progress | None
) -> dict[str, Dataset]:
    out = hold.folder
    if outcome.recover(hold) and not options.overwrite:
        done = outcome.finished(out, outcome.find(out), marker)
        if done is not None:
            return done
    there = outcome.find(out)
    outcome.refuse_others(out, there, marker, overwrite=options.overwrite)
    if there:
        outcome.refuse_own_source(out, there, parquet_files(source))
    splits = open_source(source, options)
    facts = {"source": marker["source"], "parents": parents(source)}
    with outcome.placed(out, there, splits, marker, hold) as place, _looked_for(splits, options, progress) as looked:
        if looked is not None:
            facts["looked_for"] = duplicates_found(
                looked.hashes, looked.starts, dropped=options.prepare.duplicates == "drop"
            )
        if options.prepare.documents is not None and options.prepare.duplicates != "keep":
            splits, facts["looked_for"] = _without_alike(splits, options, progress)
        job = _Job(source, options, progress, looked, facts)
        packed = {name: job.pack(place, name, split) for name, split in splits.items()}
        if options.overwrite and any(held.finished for held in there.values()):
            actions.note(out, "delete")
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
    cards = {name: d.info.get("card") for name, d in done.items()}
    return {"dataset": out, "splits": splits, "columns": columns, "cards": cards}


@dataclass
class _Looked:
    """The hashes of all rows, and the first row of each split among them."""

    hashes: RowHashes
    starts: dict[str, int]


@contextlib.contextmanager
def _looked_for(
    splits: Mapping[str, Split], options: PackOptions, progress: Progress | None
) -> Iterator[_Looked | None]:
    """Yield the rows that are there twice, found by reading everything once; None if nobody asked."""
    if options.prepare.duplicates == "keep" or options.prepare.documents is not None:
        yield None
        return
    with RowHashes(by_key=options.prepare.key is not None) as hashes:
        starts = {}
        for name, split in splits.items():
            starts[name] = hashes.rows
            label = label_of(split.columns, options.label) if len(split.columns) > 1 else None
            names = tuple(column.name for column in split.columns if column.name != label)
            for piece in _pieces(replace(split, reader=HashReader(split.reader, names, label))):
                if not isinstance(piece, Removed):
                    hashes.add(piece)
                    if progress is not None:
                        progress(f"{name}: duplicates", hashes.rows - starts[name], split.rows)
        hashes.finish()
        yield _Looked(hashes, starts)


def _without_alike(
    splits: Mapping[str, Split], options: PackOptions, progress: Progress | None
) -> tuple[dict[str, Split], dict[str, Any]]:
    """Return the splits without documents that are there before, if these are to be dropped, and what was found."""
    prepare = options.prepare
    with Alike(prepare.near) as alike:
        for name, split in splits.items():
            assert isinstance(split.reader, DocumentReader)
            reader, before = SignatureReader(split.reader.documents, prepare.near is not None), alike.documents
            for piece in _pieces(replace(split, reader=reader, chunks=tuple(enumerate(split.chunks)))):
                if not isinstance(piece, Removed):
                    alike.add(name, piece)
                    if progress is not None:
                        progress(f"{name}: duplicates", alike.documents - before, None)
        alike.finish()
        kept = {name: replace(split, chunks=alike.marked(name, split.chunks)) for name, split in splits.items()}
        return (kept if prepare.duplicates == "drop" else dict(splits)), alike.facts()


@dataclass
class _Job:
    """What is the same for all splits of a pack."""

    source: str
    options: PackOptions
    progress: Progress | None
    looked: _Looked | None
    facts: dict[str, Any]

    def pack(self, place: outcome.Place, name: str, split: Split) -> Dataset:
        """Write the shards of a split; raises DataError if no row is left."""
        url, hold = place.shards(name), place.hold
        windows = Windows(split.window, split.end) if split.window is not None else None
        removals = Removals()
        with ShardWriter(url, split.columns, self.options, mark=place.mark, check=hold.check) as writer:
            for arrays in self._kept(name, split, removals):
                writer.write({"tokens": windows.push(arrays["tokens"])} if windows else arrays)
                if self.progress is not None:
                    self.progress(name, writer.rows, split.rows)
            if windows is not None and len(last := windows.last()):
                writer.write({"tokens": last})
            shards, columns = writer.finish()
        if not writer.rows:
            why = f" left after {', '.join(removals.rows)}" if removals.rows else ""
            raise DataError(f"{self.source}: the {name} split has no rows{why}; give more data, or another split")
        facts = {**self.facts, **{key: split.info.get(key) for key in ("classes", "tokenizer")}}
        of_text = {"dropped_tokens": windows.dropped, **windows.facts()} if windows else {}
        facts["documents"] = windows.facts() if windows else {}
        card = make_card(written=writer.rows, removals=removals, sums=writer.sums(), options=self.options, facts=facts)
        return Dataset(
            url=url,
            columns=columns,
            shards=shards,
            fingerprint=fingerprint(columns, shards),
            packed=True,
            key=self.options.encrypt,
            info={**split.info, **of_text, "card": card},
        )

    def _kept(self, name: str, split: Split, removals: Removals) -> Iterator[Arrays]:
        """Yield the pieces of a split without the rows that are to be removed, which are counted."""
        label = label_of(split.columns, self.options.label)
        read = written = 0
        for piece in _pieces(split):
            if isinstance(piece, Removed):
                removals.add(piece)
                continue
            arrays = {key: array for key, array in piece.items() if key != KEY}
            rows = len(next(iter(arrays.values())))
            if self.looked is not None and self.options.prepare.duplicates == "drop":
                twice = self.looked.hashes.twice(self.looked.starts[name] + read, rows)
                if twice.any():
                    first = f"row {read + int(twice.argmax())} of what was left"
                    removals.add(Removed("duplicates", int(twice.sum()), first))
                    arrays = {key: array[~twice] for key, array in arrays.items()}
            check_labels(arrays, label, self.options.prepare.classes, name=name, first=written)
            read += rows
            written += len(next(iter(arrays.values())))
            yield arrays


def _pieces(split: Split) -> Iterator[Arrays | Removed]:
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
                elif message:
                    yield from (Removed(*removed) for removed in json.loads(message))
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
    ask_nothing(context)
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
    """What a task does: read its chunk, and hand over pieces, then their end with what was removed, or an error."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __call__(self, work: Any) -> Iterator[Any]:
        for place, chunk in zip(work["place"].to_pylist(), work["chunk"].to_pylist(), strict=True):
            piece, removed = 0, []
            try:
                for arrays in self.reader.read(pickle.loads(chunk)):  # noqa: S301 -- we pickled it
                    if isinstance(arrays, Removed):
                        removed.append(astuple(arrays))
                        continue
                    yield _row(place, piece, data=_stored(arrays))
                    piece += 1
            except ElastrainError as error:
                yield _row(place, piece, error=type(error).__name__, message=str(error))
            else:
                yield _row(place, piece, message=json.dumps(removed) if removed else "")


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
