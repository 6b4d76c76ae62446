"""Columns: arrays to Arrow and back without loss, and what is said about what is no array."""

import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastrain.data.columns import Array, Column, decode, describe, describe_values, encode, from_table, to_table
from elastrain.errors import DataError

DTYPES = ["uint8", "int8", "uint16", "int16", "int32", "int64", "float16", "float32", "float64", "bool"]


def column_of(array: Array, **given: Any) -> Column:
    """Return the column that an array is."""
    return Column(name="x", dtype=str(array.dtype), shape=array.shape[1:], **given)


@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(0, 5),
    shape=st.lists(st.integers(1, 3), max_size=3),
    seed=st.integers(0, 99),
)
def test_any_array_comes_back_through_a_parquet_file(dtype: str, rows: int, shape: list[int], seed: int) -> None:
    array = np.random.default_rng(seed).integers(0, 2, (rows, *shape)).astype(dtype)
    file = io.BytesIO()
    pq.write_table(to_table({"x": array}), file)
    table = pq.read_table(io.BytesIO(file.getvalue()))
    result = from_table(table, where="here")["x"]
    assert result.dtype == dtype
    assert result.shape == array.shape
    assert np.array_equal(result, array)


def test_tensors_are_decoded_without_a_copy() -> None:
    array = np.arange(24, dtype=np.int32).reshape(4, 6)
    field, arrow = encode(array, column_of(array))
    values = decode(pa.chunked_array([arrow]), column_of(array), where="here")
    assert np.shares_memory(values, array)
    assert field.type == pa.binary(24)
    assert {key.decode(): value.decode() for key, value in field.metadata.items()} == {
        "elastrain.dtype": "int32",
        "elastrain.shape": "[6]",
    }


def test_slices_and_chunks_are_decoded_where_they_begin() -> None:
    array = np.arange(60, dtype=np.int16).reshape(10, 2, 3)
    _, arrow = encode(array, column_of(array))
    chunked = pa.chunked_array([arrow.slice(1, 2), arrow.slice(7, 3)])
    expected = np.concatenate([array[1:3], array[7:10]])
    assert np.array_equal(decode(chunked, column_of(array), where="here"), expected)
    lists = pa.array(array.reshape(10, 6).tolist(), pa.list_(pa.int16())).slice(3, 4)
    column = Column(name="x", dtype="int16", shape=(6,))
    assert np.array_equal(decode(pa.chunked_array([lists]), column, where="here"), array.reshape(10, 6)[3:7])
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(array.ravel()), 6).slice(3, 4)
    assert np.array_equal(decode(pa.chunked_array([fixed]), column, where="here"), array.reshape(10, 6)[3:7])


def test_num_values_travel_with_the_field() -> None:
    array = np.zeros(3, np.uint8)
    field, _ = encode(array, column_of(array, num_values=10))
    assert describe(field) == column_of(array, num_values=10)


@pytest.mark.parametrize(
    ("kind", "dtype", "shape"),
    [
        (pa.int16(), "int16", ()),
        (pa.float16(), "float16", ()),
        (pa.bool_(), "bool", ()),
        (pa.list_(pa.float32(), 4), "float32", (4,)),
        (pa.list_(pa.list_(pa.uint8(), 4), 2), "uint8", (2, 4)),
        (pa.fixed_shape_tensor(pa.int32(), (2, 3)), "int32", (2, 3)),
    ],
)
def test_plain_types_tell_what_they_hold(kind: pa.DataType, dtype: str, shape: tuple[int, ...]) -> None:
    assert describe(pa.field("x", kind)) == Column(name="x", dtype=dtype, shape=shape)


@pytest.mark.parametrize("kind", [pa.string(), pa.list_(pa.int8()), pa.binary(), pa.date32(), pa.struct([])])
def test_other_types_do_not(kind: pa.DataType) -> None:
    assert describe(pa.field("x", kind)) is None


def test_lists_are_described_by_a_sample() -> None:
    sample = pa.chunked_array([pa.array([[1.0, 2.0], [3.0, 4.0]])])
    assert describe_values(pa.field("x", sample.type), sample, where="f") == Column(
        name="x", dtype="float64", shape=(2,)
    )


@pytest.mark.parametrize(
    ("values", "shape", "words"),
    [
        (pa.array([1, None]), (), "1 nulls"),
        (pa.array([[1, 2], [3]]), (2,), "1 to 2 values"),
        (pa.array([[1, None]]), (2,), "nulls inside its lists"),
        (pa.array([[1, 2]]), (3,), r"does not hold \[3\] values"),
        (pa.array(["a"]), (), "no number"),
    ],
)
def test_what_is_no_array_names_file_and_column(values: pa.Array, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(DataError, match=f"f.parquet.*'x'.*{words}"):
        decode(pa.chunked_array([values]), Column(name="x", dtype="int64", shape=shape), where="f.parquet")


def test_images_are_decoded_and_broken_ones_named() -> None:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), dtype=np.uint8)
    files = []
    for picture in pixels:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        files.append(file.getvalue())
    values = pa.chunked_array([pa.array(files)])
    column = describe_values(pa.field("x", pa.binary()), values, where="f")
    assert column.dtype == "image"
    assert np.array_equal(decode(values, column, where="f"), pixels)
    with pytest.raises(DataError, match="no image"):
        decode(pa.chunked_array([pa.array([b"\x89PNG broken"])]), column, where="f")


def test_any_parquet_reader_sees_the_bytes() -> None:
    array = np.arange(12, dtype=np.uint16).reshape(2, 6)
    file = io.BytesIO()
    pq.write_table(to_table({"x": array, "y": np.array([1, 2])}), file)
    frame = pq.read_table(io.BytesIO(file.getvalue())).to_pandas()
    assert frame["y"].tolist() == [1, 2]
    field = pq.read_schema(io.BytesIO(file.getvalue())).field("x")
    dtype, shape = (field.metadata[key].decode() for key in (b"elastrain.dtype", b"elastrain.shape"))
    assert np.frombuffer(frame["x"][1], dtype).reshape(json.loads(shape)).tolist() == array[1].tolist()
