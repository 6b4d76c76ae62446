"""Columns: arrays to Arrow and back without loss, and what is said about what is no array."""

import io
import itertools
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastrain.data.columns import Array, Column, decode, describe, describe_values, encode, from_table, to_table
from elastrain.data.dataset import Dataset
from elastrain.data.reader import read_rows, sources_of
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


def encoded(pixels: Array, form: str = "PNG", **options: Any) -> bytes:
    """An image file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def pictures(number: int, height: int = 3, width: int = 4) -> Array:
    return np.random.default_rng(number).integers(0, 256, (number, height, width, 3), dtype=np.uint8)


def folder_of(path: Path, files: list[bytes]) -> Dataset:
    """A plain folder of one file with two images a row group."""
    path.mkdir(exist_ok=True)
    pq.write_table(pa.table({"image": files, "label": range(len(files))}), path / "a.parquet", row_group_size=2)
    return Dataset.open(str(path))


def read_all(dataset: Dataset) -> Array:
    sources = sources_of(dataset, np.arange(len(dataset.group_rows)))
    return read_rows(dataset.columns, sources, np.arange(dataset.num_rows))["image"]


def test_images_are_described_as_what_they_decode_to(tmp_path: Path) -> None:
    pixels = pictures(5)
    dataset = folder_of(tmp_path, [encoded(picture) for picture in pixels])
    assert dataset.columns[0] == Column(name="image", dtype="uint8", shape=(3, 4, 3))
    assert dataset.row_bytes == 3 * 4 * 3 + 8
    assert np.array_equal(read_all(dataset), pixels)


def test_grey_images_and_turned_ones_come_as_a_viewer_shows_them(tmp_path: Path) -> None:
    from PIL import Image

    grey, colour = pictures(2)[:, :, :, 0]
    turned = Image.Exif()
    turned[0x0112] = 6  # shown after a quarter turn to the right
    lying = np.ascontiguousarray(np.rot90(pictures(3)[2]))
    files = [encoded(grey), encoded(colour), encoded(lying, exif=turned)]
    found = read_all(folder_of(tmp_path, files))
    assert np.array_equal(found[0], np.repeat(grey[:, :, None], 3, axis=2))
    assert np.array_equal(found[2], pictures(3)[2])


def flipped(file: bytes, place: int, mask: int = 0x40) -> bytes:
    """The file with one other byte."""
    return file[:place] + bytes([file[place] ^ mask]) + file[place + 1 :]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP"])
def test_no_flipped_byte_escapes_as_an_error_of_the_decoder(form: str) -> None:
    column, file, said = Column(name="x", dtype="uint8", shape=(3, 4, 3)), encoded(pictures(1)[0], form), []
    for place, mask in itertools.product(range(len(file)), (0x01, 0x40, 0xFF)):
        try:
            decode(pa.chunked_array([pa.array([flipped(file, place, mask)])]), column, where="f")
        except DataError as error:
            said.append(str(error))
    assert said
    assert all(text.startswith("f: column 'x', row 0: ") for text in said)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (encoded(pictures(1, 6, 2)[0]), "2x6 pixels where the first image has 4x3; pack with --image-size"),
        (encoded(pictures(1, 5, 5)[0]), "5x5 pixels where the first image has 4x3; pack with --image-size"),
        (encoded(np.full((3, 4), 40_000, np.uint16)), "pixels of mode I;16, not 8 bits a channel; convert"),
        (flipped(encoded(pictures(1)[0]), 40), "not a readable image.*restore or remove"),
        (flipped(encoded(pictures(1)[0]), 13), "not a readable image.*restore or remove"),
        (b"\x89PNG broken", "not a readable image.*restore or remove"),
        (encoded(pictures(1)[0])[:-40], "not a readable image.*restore or remove"),
    ],
    ids=["as many pixels", "larger", "16 bits", "in a number", "in a name", "no image", "truncated"],
)
def test_an_image_that_does_not_fit_names_file_and_row(file: bytes, words: str, tmp_path: Path) -> None:
    """Also one whose pixels would fill the same bytes in another shape."""
    files = [encoded(picture) for picture in pictures(4)]
    dataset = folder_of(tmp_path, [*files[:3], file])
    with pytest.raises(DataError, match=rf"a\.parquet row group 1: column 'image', row 1: {words}"):
        read_all(dataset)
    without = folder_of(tmp_path / "first", [file, *files])
    if "pixels where" not in words:
        assert re.search(words, without.unusable["image"])
        assert [column.name for column in without.columns] == ["label"]


def test_a_file_that_holds_another_shape_than_the_dataset_is_named(tmp_path: Path) -> None:
    """As many bytes a row, so that nothing else would notice."""
    pq.write_table(to_table({"x": np.arange(24, dtype=np.uint8).reshape(2, 3, 4)}), tmp_path / "a.parquet")
    dataset = Dataset.open(str(tmp_path))
    other = Column(name="x", dtype="uint8", shape=(4, 3))
    with pytest.raises(DataError, match=r"a\.parquet.*'x' holds uint8\[3, 4\], where the dataset has uint8\[4, 3\]"):
        read_rows([other], sources_of(dataset, np.arange(1)), np.arange(2))


@pytest.mark.parametrize("name", ["ray.data.arrow_tensor", "ray.data.arrow_tensor_v2"])
def test_ray_tensors_tell_their_shape_without_ray(name: str) -> None:
    metadata = {"ARROW:extension:name": name, "ARROW:extension:metadata": "[2, 3]"}
    field = pa.field("x", pa.large_list(pa.uint8()), metadata=metadata)
    assert describe(field) == Column(name="x", dtype="uint8", shape=(2, 3))
    pickled = field.with_metadata({**metadata, "ARROW:extension:metadata": pickle.dumps((2, 3))})
    with pytest.raises(DataError, match=r"'x'.*Ray 2\.49 to 2\.54"):
        describe(pickled)


WRITE = """
import sys, numpy as np, pyarrow as pa, pyarrow.parquet as pq
from ray.data._internal.tensor_extensions.arrow import ArrowTensorType, ArrowTensorTypeV2
flat = [[1, 2, 3, 4, 5, 6]] * 4
stored = pa.ExtensionArray.from_storage
tensors = {
    "v1": stored(ArrowTensorType((2, 3), pa.uint8()), pa.array(flat, pa.list_(pa.uint8()))),
    "v2": stored(ArrowTensorTypeV2((3, 2), pa.int32()), pa.array(flat, pa.large_list(pa.int32()))),
    "arrow": pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((4, 2, 3), np.float32)),
}
pq.write_table(pa.table(tensors), sys.argv[1] + "/a.parquet")
"""
OPEN = """
import json, sys, numpy as np
if sys.argv[2] == "registered":
    import ray.data
from elastrain.data.dataset import Dataset
from elastrain.data.reader import read_rows, sources_of
data = Dataset.open(sys.argv[1])
rows = read_rows(data.columns, sources_of(data, np.arange(1)), np.arange(4))
print(json.dumps([data.fingerprint, [(c.name, c.dtype, c.shape) for c in data.columns], rows["v2"].tolist()]))
"""


@pytest.mark.slow
def test_tensors_are_the_same_whether_or_not_ray_data_was_imported(tmp_path: Path) -> None:
    def python(code: str, *arguments: str) -> str:
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path), *arguments], capture_output=True, check=True)
        return done.stdout.decode()

    python(WRITE)
    plain, registered = (json.loads(python(OPEN, how)) for how in ("plain", "registered"))
    assert plain == registered
    assert plain[1] == [["v1", "uint8", [2, 3]], ["v2", "int32", [3, 2]], ["arrow", "float32", [2, 3]]]


def test_any_parquet_reader_sees_the_bytes() -> None:
    array = np.arange(12, dtype=np.uint16).reshape(2, 6)
    file = io.BytesIO()
    pq.write_table(to_table({"x": array, "y": np.array([1, 2])}), file)
    frame = pq.read_table(io.BytesIO(file.getvalue())).to_pandas()
    assert frame["y"].tolist() == [1, 2]
    field = pq.read_schema(io.BytesIO(file.getvalue())).field("x")
    dtype, shape = (field.metadata[key].decode() for key in (b"elastrain.dtype", b"elastrain.shape"))
    assert np.frombuffer(frame["x"][1], dtype).reshape(json.loads(shape)).tolist() == array[1].tolist()
