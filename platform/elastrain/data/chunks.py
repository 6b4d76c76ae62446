"""What a source of `pack` is made of: options, splits, and independent chunks of work that readers turn into arrays.

A chunk is a small picklable description of work (a file and a range). Reading one yields pieces: arrays of bounded
size, one a column. Neither Ray nor torch is known here.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from elastrain import storage
from elastrain.data.columns import Array, Column
from elastrain.data.plan import row_seeds
from elastrain.data.preparation import Preparation
from elastrain.errors import DataError, SpecError, StorageError
from elastrain.keys import check_name

T = TypeVar("T")
Arrays = dict[str, Array]
PIECE_BYTES = 4 << 20  # decoded bytes of what a reader yields at once
CHUNK_BYTES = 32 << 20  # decoded bytes of one task: large against what a task costs, small against memory
CODECS = ("none", "lz4", "zstd", "snappy")
SIGNED_BYTES = 64 << 20  # a source up to this size is known by its content, a larger one by names and sizes
WORDS = {"train": "train", "training": "train", "test": "test", "t10k": "test"}
WORDS |= dict.fromkeys(("val", "valid", "validation", "dev"), "val")


@dataclass(frozen=True, kw_only=True, slots=True)
class PackOptions:
    """How to pack; raises SpecError if a value makes no sense.

    `test_fraction` None is the source's default (digits 0.2, text 0.1, others none). Text has `context`, `tokenizer`;
    images have `image_size`; csv and parquet have `label`, `columns` (others are left out). `row_group_bytes` and
    `shard_bytes` are decoded bytes. `prepare` says what is checked, removed and noted; `encrypt` is the name of a key.
    """

    context: int = 64
    tokenizer: str = "bytes"
    test_fraction: float | None = None
    codec: str = "lz4"
    row_group_bytes: int = 1 << 20
    shard_bytes: int = 128 << 20
    image_size: int | None = None
    label: str | None = None
    columns: tuple[str, ...] | None = None
    prepare: Preparation = field(default_factory=Preparation)
    encrypt: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise SpecError(f"codec {self.codec!r} is not one of {', '.join(CODECS)}")
        if self.tokenizer != "bytes" and not re.fullmatch(r"bpe:[0-9]+", self.tokenizer):
            raise SpecError(f"tokenizer {self.tokenizer!r} is neither bytes nor bpe:SIZE, such as bpe:4096")
        if self.test_fraction is not None and not 0 <= self.test_fraction < 1:
            raise SpecError(f"test fraction {self.test_fraction} is not in 0 <= fraction < 1")
        if self.test_fraction is not None and self.prepare.split is not None:
            raise SpecError("--test-fraction and --split say the same; give one of them")
        if self.prepare.by is not None and not (self.prepare.split or self.test_fraction):
            raise SpecError("--by says how rows are split; give --split or --test-fraction with it")
        if self.encrypt is not None:
            check_name(self.encrypt, where="encrypt")
        self._check_sizes()

    def _check_sizes(self) -> None:
        sizes = {"context": self.context, "row group bytes": self.row_group_bytes, "shard bytes": self.shard_bytes}
        for name, size in {**sizes, "image size": 1 if self.image_size is None else self.image_size}.items():
            if size < 1:
                raise SpecError(f"{name} {size} is not positive")

    def identity(self) -> dict[str, Any]:
        """Return what decides the packed bytes, as a JSON object."""
        held = asdict(self)
        del held["overwrite"], held["prepare"]
        if self.encrypt is None:
            del held["encrypt"]  # so that what was packed before there was such an option counts as the same
        return {**held, "columns": None if self.columns is None else list(self.columns), **self.prepare.identity()}


@dataclass(frozen=True, slots=True)
class Removed:
    """Rows that a step took out of a chunk: how many, the place of the first, and how many for what is in a column."""

    step: str
    rows: int
    first: str
    columns: tuple[tuple[str, int], ...] = ()


class Reader(Protocol):
    """Turns a chunk into pieces of the split's columns; picklable, so that it can be sent to the tasks once."""

    def read(self, chunk: Any) -> Iterator[Arrays | Removed]:
        """Yield the chunk's rows in order, and at its end what was removed; raises DataError naming the file."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """One part of a source: its chunks in order and what reads them.

    `rows` is None where only reading tells. With `window` W the pieces are a stream of tokens, and row i holds the
    tokens [iW, iW + W]: consecutive rows share one token; `end` is the token after each document, where there are
    documents. `files` are to be stored beside the splits.
    """

    columns: tuple[Column, ...]
    chunks: tuple[Any, ...]
    reader: Reader
    rows: int | None = None
    window: int | None = None
    end: int | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)

    def pieces(self) -> Iterator[Arrays]:
        """Yield every piece of the split in order, in this process; raises DataError naming the file."""
        for chunk in self.chunks:
            for piece in self.reader.read(chunk):
                if not isinstance(piece, Removed):
                    yield piece


@dataclass(frozen=True, slots=True)
class Files:
    """The files of a source: path relative to `root` and size, in path order."""

    root: str
    files: tuple[storage.FileInfo, ...]

    def url(self, file: storage.FileInfo) -> str:
        """Return where a file lies."""
        return storage.join(self.root, file.path)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size_bytes for file in self.files)


def find(source: str, suffixes: Sequence[str] = ("",)) -> Files:
    """Return the files that a path, folder (any depth) or glob (`*`, `?`, `[…]`, `**`) names.

    `suffixes` filters what is in a folder. Raises DataError if there is none, StorageError if storage does not
    answer.
    """
    target = storage.absolute(source)
    if storage.is_local(target) and storage.exists(target) and storage.local_path(target).is_file():
        path = storage.local_path(target)
        return Files(str(path.parent), (storage.FileInfo(path=path.name, size_bytes=path.stat().st_size),))
    wild = re.search(r"[*?\[]", target)
    root = (target[: wild.start()].rpartition("/")[0] or "/") if wild else target
    try:
        listed = storage.list_files(root)
    except FileNotFoundError as error:
        raise DataError(f"{source}: no such file or folder; check the path") from error
    if [file.path for file in listed] == [""]:  # an object store lists a file as if it were a folder
        root, _, name = target.rpartition("/")
        return Files(root, (storage.FileInfo(path=name, size_bytes=listed[0].size_bytes),))
    if wild:
        pattern = _glob(target[len(root.rstrip("/")) + 1 :])
        kept = [file for file in listed if pattern.fullmatch(file.path)]
    else:
        kept = [file for file in listed if file.path.lower().endswith(tuple(suffixes))]
    if not kept:
        wanted = "file matches" if wild else f"{' or '.join(filter(None, suffixes))} file in there".lstrip()
        raise DataError(f"{source}: no {wanted}; check the path (names with . or _ in front are left out)")
    return Files(root, tuple(kept))


def signature(files: Files) -> str:
    """Return a hash that changes with the names and sizes of files, and with their content where that is little."""
    found = hashlib.sha256()
    for file in files.files:
        found.update(f"{file.path}\0{file.size_bytes}\0".encode())
        if files.size_bytes <= SIGNED_BYTES:
            found.update(hashlib.sha256(attempt(files.url(file), storage.read_bytes)).digest())
    return found.hexdigest()


def named_splits(files: Files, options: PackOptions) -> dict[str, Files] | None:
    """Return the splits that names tell, None if they tell of none or of one only.

    A name tells if the file or a folder above it is called train, test, val, … (alone or before `-`, `_` or `.`).
    What is called validation is the test split where no other is. Raises DataError if some names tell and others do
    not, unless an option says how to split.
    """
    told = {file: _told(file.path) for file in files.files}
    if None in told.values():
        refuse_half_named(files, told, options)
        return None
    found: dict[str, list[storage.FileInfo]] = {}
    for file, name in told.items():
        found.setdefault(str(name), []).append(file)
    if "train" not in found or len(found) == 1:
        return None
    if "test" not in found:
        found["test"] = found.pop("val")
    return {name: Files(files.root, tuple(found[name])) for name in ("train", "val", "test") if name in found}


def refuse_half_named(files: Files, told: Mapping[storage.FileInfo, str | None], options: PackOptions) -> None:
    """Raise DataError, naming a file, if some but not all are `told` to be of a split, and no option splits them."""
    known = next((file for file, name in told.items() if name), None)
    if known is None or options.test_fraction is not None or options.prepare.split is not None:
        return
    stray = next(file for file, name in told.items() if not name)
    raise DataError(
        f"{files.url(stray)}: its name says neither train nor test, but that of {known.path} says {told[known]}; leave "
        f"it out, rename it, or say with --test-fraction how to split all files alike (0: all of them are train)"
    )


def _told(path: str) -> str | None:
    words = (WORDS.get(re.split(r"[-_.]", part.lower(), maxsplit=1)[0]) for part in path.split("/"))
    return next(filter(None, words), None)


def own_split_only(source: str, options: PackOptions) -> None:
    """Raise SpecError if a split is asked of a source that has its own."""
    if options.test_fraction is not None or options.prepare.split is not None:
        raise SpecError(f"{source}: the source has its own split; leave out --test-fraction and --split")


def place_hashes(path: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Return what decides a row's split where no key does: a hash of its file's path and its number there."""
    seed = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "little")
    return row_seeds(seed, np.zeros(len(rows), np.int64), rows)


def grouped(items: Sequence[T], weight: Callable[[T], int], most: int) -> list[tuple[T, ...]]:
    """Cut a sequence into runs whose weights sum to at most `most`; a heavier item is alone."""
    runs: list[list[T]] = []
    total = 0
    for item in items:
        if not runs or total + weight(item) > most:
            runs.append([])
            total = 0
        runs[-1].append(item)
        total += weight(item)
    return [tuple(run) for run in runs]


def class_dtype(classes: int) -> str:
    """Return the dtype of class indices: as small as holds them, and one that torch computes with."""
    return "uint8" if classes <= 256 else "int32"


def attempt(url: str, action: Callable[[str], T]) -> T:
    """Return `action(url)`; raises DataError if the file is gone, StorageError naming it if it cannot be read."""
    try:
        return action(url)
    except FileNotFoundError as error:
        raise DataError(f"{url}: no such file; restore it, or pack what is there") from error
    except OSError as error:
        raise StorageError(f"cannot read {url}: {first_line(error)}") from error


def read_range(url: str, start: int, stop: int) -> bytes:
    """Return bytes [start, stop) of a file; raises DataError if it is gone or shorter than it was."""

    def read(url: str) -> bytes:
        with storage.open_arrow(url) as file:
            return bytes(file.read_at(stop - start, start))

    data = attempt(url, read)
    if len(data) < stop - start:
        raise DataError(f"{url}: the file became shorter while it was packed; pack it again")
    return data


def first_line(error: BaseException) -> str:
    """Return what an error of a library says, short."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _glob(pattern: str) -> re.Pattern[str]:
    """Return the expression of a glob over relative paths; `**/` stands for any number of folders."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    translated = [
        meaning.get(p, p.replace("[!", "[^") if p.startswith("[") and len(p) > 2 else re.escape(p)) for p in parts
    ]
    return re.compile("".join(translated))
