"""Columns of rows: Arrow in, numpy arrays of shape (rows, *shape) out, and back.

A tensor is stored as `fixed_size_binary` with `dtype` and `shape` in the field's metadata: any Parquet reader sees
bytes, ours sees an array without a copy. Scalars, lists of one length, fixed-size lists, Arrow and Ray tensors and
encoded images are understood as they are found.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from elastrain.data.dataset import Column as Column
from elastrain.errors import DataError

Array = npt.NDArray[Any]
DTYPE, SHAPE, VALUES = b"elastrain.dtype", b"elastrain.shape", b"elastrain.values"
RAY_TENSORS = (b"ray.data.arrow_tensor", b"ray.data.arrow_tensor_v2")
IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"RIFF")


def describe(field: pa.Field) -> Column | None:
    """Return what a Parquet field holds, or None if only its values tell (lists) or it is no number at all.

    Raises DataError for a Ray tensor whose shape is pickled.
    """
    metadata: Mapping[bytes, bytes] = field.metadata or {}
    if DTYPE in metadata:
        values = metadata.get(VALUES)
        return Column(
            name=field.name,
            dtype=metadata[DTYPE].decode(),
            shape=tuple(json.loads(metadata[SHAPE])),
            num_values=int(values) if values else None,
        )
    kind = field.type
    shape: tuple[int, ...] = ()
    if isinstance(kind, pa.BaseExtensionType):
        shape, kind = tuple(getattr(kind, "shape", ())), _element(kind.storage_type)
    elif metadata.get(b"ARROW:extension:name") in RAY_TENSORS:
        # What the branch above sees once somebody has imported ray.data, which registers the type.
        shape, kind = _ray_shape(field), _element(kind)
    while pa.types.is_fixed_size_list(kind):
        shape, kind = (*shape, kind.list_size), kind.value_type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return Column(name=field.name, dtype=str(np.dtype(kind.to_pandas_dtype())), shape=shape)
    return None


def describe_values(field: pa.Field, sample: pa.ChunkedArray, *, where: str) -> Column:
    """Return what a column holds, looking at `sample` (one row or more) where the type does not tell.

    Encoded images have dtype `image` and shape () here; `describe_image` tells what they are once decoded. Raises
    DataError if the values are no numbers, no lists of one length and no images.
    """
    known = describe(field)
    if known is not None:
        return known
    if _is_binary(field.type):
        if len(sample) and (sample[0].as_py() or b"").startswith(IMAGE_STARTS):
            return Column(name=field.name, dtype="image", shape=())
    elif _is_list(field.type) and len(sample):
        array = decode(sample, Column(name=field.name, dtype="", shape=()), where=where)
        return Column(name=field.name, dtype=str(array.dtype), shape=array.shape[1:])
    raise DataError(
        f"{where}: column {field.name!r} holds {field.type}, which is no number, tensor, list of one length or image; "
        f"leave it out with data.columns or turn it into numbers with `elastrain pack`"
    )


def describe_image(column: Column, sample: pa.ChunkedArray, *, where: str) -> Column:
    """Return what a column of encoded images holds once decoded: uint8 (height, width, 3), as large as the first.

    Raises DataError, naming `where`, if the first is no image of 8 bits a channel.
    """
    from elastrain.data.images import decode_image  # noqa: PLC0415 -- it builds on this module

    first = decode_image(sample[0].as_py(), None, None, f"{where}: column {column.name!r}, row 0")
    return replace(column, dtype="uint8", shape=(*first.shape[:2], 3))


def decode(values: pa.ChunkedArray, column: Column, *, where: str) -> Array:
    """Return a column as an array of shape (rows, *column.shape); no copy where the bytes lie as they should.

    Encoded images come as RGB. Raises DataError, naming `where`, on nulls, on lists of unequal length, on bytes that
    are no image of 8 bits a channel, and on whatever has another shape than the column.
    """
    array = _joined(values)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if array.null_count:
        raise DataError(f"{where}: column {column.name!r} has {array.null_count} nulls; fill or drop these rows first")
    if _is_binary(array.type) and len(column.shape) == 3:
        return _images(array, column, where)
    if pa.types.is_fixed_size_binary(array.type):
        return _from_fixed_binary(array, column, where)
    rows = len(array)
    while _is_list(array.type):
        array = _flattened(array, column, where)
    flat: Array = array.to_numpy(zero_copy_only=False)
    if flat.dtype == object:
        raise DataError(f"{where}: column {column.name!r} holds {values.type}, which is no number or tensor")
    shape = column.shape if column.dtype else (flat.size // max(rows, 1),)
    if flat.size != rows * int(np.prod(shape, dtype=np.int64)):
        raise DataError(f"{where}: column {column.name!r} does not hold {list(shape)} values in each row")
    return flat.reshape(rows, *shape)


def encode(array: Array, column: Column) -> tuple[pa.Field, pa.Array]:
    """Return rows of shape (rows, *shape) as an Arrow field and array; a scalar column stays a scalar."""
    values = {} if column.num_values is None else {VALUES: str(column.num_values).encode()}
    if not column.shape:
        arrow = pa.array(array)
        metadata = {DTYPE: column.dtype.encode(), SHAPE: b"[]", **values}
        return pa.field(column.name, arrow.type, nullable=False, metadata=metadata), arrow
    metadata = {DTYPE: column.dtype.encode(), SHAPE: json.dumps(column.shape).encode(), **values}
    kind = pa.binary(column.row_bytes)
    data = pa.py_buffer(np.ascontiguousarray(array))
    arrow = pa.FixedSizeBinaryArray.from_buffers(kind, len(array), [None, data])
    return pa.field(column.name, kind, nullable=False, metadata=metadata), arrow


def to_table(arrays: Mapping[str, Array]) -> pa.Table:
    """Return arrays of equal length as one table; dtype and shape travel in the fields' metadata."""
    encoded = [encode(a, Column(name=n, dtype=str(a.dtype), shape=a.shape[1:])) for n, a in arrays.items()]
    return pa.table([array for _, array in encoded], schema=pa.schema([field for field, _ in encoded]))


def from_table(table: pa.Table, *, where: str) -> dict[str, Array]:
    """Return the arrays that `to_table` stored; raises DataError for a table that it did not make."""
    arrays: dict[str, Array] = {}
    for field in table.schema:
        column = describe(field)
        if column is None:
            raise DataError(f"{where}: column {field.name!r} carries no dtype")
        arrays[field.name] = decode(table.column(field.name), column, where=where)
    return arrays


def _joined(values: "pa.ChunkedArray | pa.Array") -> pa.Array:
    """Return chunks as one array; a single chunk as it is, which `combine_chunks` would copy."""
    if not isinstance(values, pa.ChunkedArray):
        return values
    if values.num_chunks == 1:
        return values.chunk(0)
    return pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], values.type)


def _element(kind: pa.DataType) -> pa.DataType:
    while _is_list(kind):
        kind = kind.value_type
    return kind


def _ray_shape(field: pa.Field) -> tuple[int, ...]:
    try:
        return tuple(json.loads(field.metadata[b"ARROW:extension:metadata"]))
    except ValueError as error:  # what pickle wrote may run anything when it is read
        raise DataError(
            f"column {field.name!r} is a tensor whose shape is pickled, as Ray 2.49 to 2.54 wrote it; write it again "
            f"with a newer Ray"
        ) from error


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _flattened(array: pa.Array, column: Column, where: str) -> pa.Array:
    if not pa.types.is_fixed_size_list(array.type) and len(array):
        lengths = np.diff(array.offsets.to_numpy())
        if lengths.min() != lengths.max():
            raise DataError(
                f"{where}: lists of column {column.name!r} have {lengths.min()} to {lengths.max()} values; "
                f"a column needs one length: pad or pack them first"
            )
    flat = array.flatten()
    if flat.null_count:
        raise DataError(f"{where}: column {column.name!r} has nulls inside its lists; fill or drop these rows first")
    return flat


def _from_fixed_binary(array: pa.FixedSizeBinaryArray, column: Column, where: str) -> Array:
    width = array.type.byte_width
    if width != column.row_bytes:
        raise DataError(
            f"{where}: column {column.name!r} holds {width} bytes a row, where {column.dtype}{list(column.shape)} has "
            f"{column.row_bytes}; restore the file, or pack the data again"
        )
    data = array.buffers()[1]
    start = array.offset * width
    raw = np.frombuffer(data, dtype=np.uint8, count=len(array) * width, offset=start) if data else np.empty(0, np.uint8)
    return raw.view(column.dtype).reshape(len(array), *column.shape)


def _images(array: pa.Array, column: Column, where: str) -> Array:
    from elastrain.data.images import decode_image  # noqa: PLC0415 -- it builds on this module

    images = np.empty((len(array), *column.shape), np.uint8)
    for row, value in enumerate(array):
        place = f"{where}: column {column.name!r}, row {row}"
        images[row] = decode_image(value.as_py(), column.shape, None, place)
    return images
