"""Ready-made image sets: the digits in scikit-learn's wheel, and MNIST's own file format (IDX), gzipped or not."""

import contextlib
import gzip
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from elastrain import storage
from elastrain.data.chunks import (
    CHUNK_BYTES,
    PIECE_BYTES,
    Arrays,
    Files,
    PackOptions,
    Split,
    attempt,
    find,
    first_line,
    own_split_only,
)
from elastrain.data.columns import Array, Column
from elastrain.errors import DataError, StorageError

DIGITS_TEST_FRACTION = 0.2
NAME = re.compile(r"(train|t10k|test)-(images|labels)[.-]idx(\d)-[a-z]+(\.gz)?")
DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
NAMES = {"images": "image", "labels": "label"}


@dataclass(frozen=True)
class ArrayReader:
    """Holds the rows itself; a chunk is (start, stop)."""

    arrays: Mapping[str, Array]

    def read(self, chunk: tuple[int, int]) -> Iterator[Arrays]:
        """Yield the rows of a range."""
        yield {name: array[slice(*chunk)] for name, array in self.arrays.items()}


def open_digits(options: PackOptions) -> dict[str, Split]:
    """Return scikit-learn's 1797 digits, of each class the same share for test; DataError without scikit-learn."""
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 -- an extra
    except ImportError as error:
        raise DataError("digits: the data come with scikit-learn: pip install 'elastrain[digits]'") from error
    bunch = load_digits()
    fraction = DIGITS_TEST_FRACTION if options.test_fraction is None else options.test_fraction
    label = bunch.target.astype(np.uint8)
    test = _every(label, fraction)
    columns = (
        Column(name="image", dtype="uint8", shape=(8, 8)),
        Column(name="label", dtype="uint8", shape=(), num_values=10),
    )
    splits = {}
    for name, mask in {"train": ~test, "test": test}.items():
        rows = int(mask.sum())
        if name == "train" or fraction:
            reader = ArrayReader({"image": bunch.images[mask].astype(np.uint8), "label": label[mask]})
            splits[name] = Split(columns=columns, chunks=((0, rows),) if rows else (), reader=reader, rows=rows)
    return splits


def _every(label: Array, fraction: float) -> npt.NDArray[np.bool_]:
    """Mark the given fraction of each class, evenly spread over its rows."""
    test = np.zeros(len(label), bool)
    for value in np.unique(label):
        rows = np.flatnonzero(label == value)
        steps = np.floor(np.arange(len(rows) + 1) * fraction + 1e-9)
        test[rows] = np.diff(steps) > 0
    return test


@dataclass(frozen=True, slots=True)
class IdxFile:
    """An IDX file: where it is, what it holds, and where its data begin."""

    url: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def zipped(self) -> bool:
        """Whether the file is compressed with gzip."""
        return self.url.endswith(".gz")

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in the file."""
        return int(np.dtype(self.dtype).itemsize * math.prod(self.shape[1:]))

    def column(self, name: str) -> Column:
        """Return the column that the file becomes, in the byte order of this machine."""
        return Column(name=name, dtype=np.dtype(self.dtype).newbyteorder("=").name, shape=self.shape[1:])


@dataclass(frozen=True)
class IdxReader:
    """Reads files of equal length side by side; a chunk is (start, stop)."""

    files: Mapping[str, IdxFile]

    def read(self, chunk: tuple[int, int]) -> Iterator[Arrays]:
        """Yield the rows of a range; raises DataError if a file is truncated, corrupted or gone."""
        start, stop = chunk
        step = max(1, PIECE_BYTES // sum(file.row_bytes for file in self.files.values()))
        with contextlib.ExitStack() as stack:
            open_files = {name: stack.enter_context(_opened(file.url)) for name, file in self.files.items()}
            for name, file in self.files.items():
                _seek(open_files[name], file, start)
            for low in range(start, stop, step):
                rows = min(step, stop - low)
                yield {name: _rows(open_files[name], file, rows) for name, file in self.files.items()}
            for name, file in self.files.items():
                # Reading to the end is what makes gzip compare its checksum.
                if stop == file.shape[0] and _read(open_files[name], file.url, 1):
                    raise DataError(f"{file.url}: more data than its header says; restore the file")


def open_idx(source: str, options: PackOptions) -> dict[str, Split]:
    """Return MNIST's `train` and, if there, `t10k` files as splits.

    Raises DataError naming the file if one is missing, no IDX file, truncated, or if images and labels differ in
    number; SpecError if a test fraction is asked for.
    """
    own_split_only(source, options)
    found: dict[tuple[str, str], str] = {}
    listed = find(source)
    for file in listed.files:
        match = NAME.fullmatch(file.path)
        if match:
            found.setdefault(("train" if match[1] == "train" else "test", match[2]), listed.url(file))
    if not any(split == "train" for split, _ in found):
        raise DataError(f"{source}: no train-images-idx3-ubyte[.gz] there; give the folder with MNIST's files")
    return {split: _idx_split(source, split, found, listed) for split in sorted({s for s, _ in found}, reverse=True)}


def _idx_split(source: str, split: str, found: Mapping[tuple[str, str], str], listed: Files) -> Split:
    sizes = {listed.url(file): file.size_bytes for file in listed.files}
    files: dict[str, IdxFile] = {}
    for kind, name in NAMES.items():
        url = found.get((split, kind))
        if url is None:
            raise DataError(f"{source}: the {split} {kind} are missing; images and labels come as two files")
        files[name] = _header(url, sizes[url])
    rows = {file.shape[0] for file in files.values()}
    if len(rows) > 1:
        images, labels = files["image"], files["label"]
        raise DataError(f"{labels.url}: {labels.shape[0]} labels for the {images.shape[0]} images of {images.url}")
    count = rows.pop()
    step = max(1, CHUNK_BYTES // sum(file.row_bytes for file in files.values()))
    if any(file.zipped for file in files.values()):
        step = max(1, count)  # gzip can only be read from its beginning
    return Split(
        columns=tuple(file.column(name) for name, file in files.items()),
        chunks=tuple((low, min(low + step, count)) for low in range(0, count, step)),
        reader=IdxReader(files),
        rows=count,
    )


def _header(url: str, size_bytes: int) -> IdxFile:
    with _opened(url) as file:
        magic = _read(file, url, 4)
        if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in DTYPES or not 1 <= magic[3] <= 8:
            raise DataError(f"{url}: not an IDX file (it begins with {magic.hex() or 'nothing'}); restore the file")
        sizes = _read(file, url, 4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise DataError(f"{url}: truncated in its header; restore the file")
    shape = tuple(int(size) for size in np.frombuffer(sizes, ">u4"))
    found = IdxFile(url, DTYPES[magic[2]], shape, 4 + len(sizes))
    if 0 in shape:
        raise DataError(f"{url}: an IDX file of {list(shape)} values holds nothing; restore the file")
    expected = found.offset + shape[0] * found.row_bytes
    if not found.zipped and expected != size_bytes:
        raise DataError(f"{url}: {size_bytes} bytes where the header promises {expected}; restore the file")
    return found


def _opened(url: str) -> contextlib.AbstractContextManager[IO[bytes]]:
    file: Any = attempt(url, storage.open_arrow)
    unzipped: Any = gzip.GzipFile(fileobj=file) if url.endswith(".gz") else file
    return contextlib.closing(unzipped)


def _read(file: IO[bytes], url: str, size: int) -> bytes:
    try:
        return file.read(size)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{url}: truncated or corrupted gzip ({first_line(error)}); restore the file") from error
    except OSError as error:
        raise StorageError(f"cannot read {url}: {first_line(error)}") from error


def _rows(file: IO[bytes], source: IdxFile, rows: int) -> Array:
    data = _read(file, source.url, rows * source.row_bytes)
    if len(data) < rows * source.row_bytes:
        raise DataError(f"{source.url}: truncated: fewer rows than its header says; restore the file")
    values = np.frombuffer(data, source.dtype).reshape(rows, *source.shape[1:])
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _seek(file: IO[bytes], source: IdxFile, row: int) -> None:
    file.seek(source.offset + row * source.row_bytes)
