"""Every kind of source: what it gives, how it splits, and what it says about broken input."""

import gzip
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastrain.data.columns import Array, encode, to_table
from elastrain.data.sources import PackOptions, Split, identity, open_source, parquet_files
from elastrain.data.tokens import BPE_PIECE_BYTES, Windows
from elastrain.errors import DataError, SpecError


def rows_of(split: Split) -> dict[str, Array]:
    """Return all rows of a split; its chunks and reader go through pickle, as they do on the way to a task."""
    reader = pickle.loads(pickle.dumps(split.reader))  # noqa: S301 -- just pickled
    pieces = [piece for chunk in split.chunks for piece in reader.read(pickle.loads(pickle.dumps(chunk)))]  # noqa: S301
    for piece in pieces:
        for column in split.columns:
            assert piece[column.name].dtype == column.dtype
            if split.window is None:
                assert piece[column.name].shape[1:] == column.shape
    arrays = {column.name: np.concatenate([piece[column.name] for piece in pieces]) for column in split.columns}
    if split.window is not None:
        arrays = {"tokens": Windows(split.window).push(arrays["tokens"])}
    if split.rows is not None:
        assert len(arrays[split.columns[0].name]) == split.rows
    return arrays


def read(source: str, **options: Any) -> dict[str, dict[str, Array]]:
    """Return the rows of every split of a source."""
    return {name: rows_of(split) for name, split in open_source(source, PackOptions(**options)).items()}


def broken(source: str, *words: str, **options: Any) -> None:
    """Check that reading the source is a DataError which says all of the words."""
    with pytest.raises(DataError) as caught:
        read(source, **options)
    for word in words:
        assert word in str(caught.value)


# --- names and options
@pytest.mark.parametrize("source", ["digits:x", "csv:", "csv", "nonsense:x", ""])
def test_an_unknown_source_is_a_usage_error(source: str) -> None:
    with pytest.raises(SpecError, match="is none of digits"):
        open_source(source, PackOptions())


@pytest.mark.parametrize(
    "source", ["text:s3://key:hidden@bucket/a.txt", "s3://key:hidden@bucket/a", "csv:http://x/?sig=hidden"]
)
def test_credentials_in_a_source_are_refused_and_not_told(source: str) -> None:
    for call in (identity, parquet_files, lambda source: open_source(source, PackOptions())):
        with pytest.raises(SpecError, match=r"holds credentials.*environment") as caught:
            call(source)
        assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{"codec": "gzip"}, {"context": 0}, {"tokenizer": "words"}, {"test_fraction": 1.0}, {"image_size": 0}],
)
def test_options_without_sense_are_usage_errors(options: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        PackOptions(**options)


@pytest.mark.parametrize("kind", ["idx", "csv", "parquet", "text", "images"])
def test_missing_and_empty_folders_are_named(kind: str, tmp_path: Path) -> None:
    broken(f"{kind}:{tmp_path}/nowhere", f"{tmp_path}/nowhere", "no such file")
    (tmp_path / "empty").mkdir()
    broken(f"{kind}:{tmp_path}/empty", f"{tmp_path}/empty")
    broken(f"{kind}:{tmp_path}/empty/*.x", f"{tmp_path}/empty/*.x")


def test_a_source_is_known_by_its_content_not_by_its_dates(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    first = identity(f"text:{file}")
    file.write_text("one")
    assert identity(f"text:{file}") == first
    file.write_text("two")
    assert identity(f"text:{file}") != first


def test_globs_find_what_they_should(tmp_path: Path) -> None:
    for name in ["a.txt", "b.md", "x/c.txt", "x/y/d.txt", "x/y/.e.txt", "[z].txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name * 100)

    def found(pattern: str) -> bytes:
        return rows_of(open_source(f"text:{tmp_path}/{pattern}", PackOptions(context=1, test_fraction=0))["train"])[
            "tokens"
        ][:, 0].tobytes()

    assert found("*.txt").startswith(b"[z].txt")
    assert found("?.txt").startswith(b"a.txt")
    assert b"b.md" not in found("**/*.txt")
    assert b"x/y/d.txt" in found("**/*.txt")
    assert b"x/c.txt" not in found("x/**/d.txt")
    assert b"a.txt" in found("[ab].*")
    assert found("[z].txt").startswith(b"[z].txt"), "a file of that very name is no pattern"


# --- digits
def test_digits_are_split_by_class_and_complete() -> None:
    splits = read("digits")
    assert {name: len(rows["label"]) for name, rows in splits.items()} == {"train": 1442, "test": 355}
    assert splits["train"]["image"].max() == 16
    counts = np.bincount(splits["test"]["label"])
    assert counts.min() >= 34
    assert counts.max() <= 36
    assert np.array_equal(splits["test"]["image"], read("digits")["test"]["image"])
    assert list(read("digits", test_fraction=0)) == ["train"]


def test_digits_without_scikit_learn_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    broken("digits", "pip install 'elastrain[digits]'")


# --- idx
CODES = {"uint8": (0x08, ">u1"), "int16": (0x0B, ">i2"), "int32": (0x0C, ">i4"), "float32": (0x0D, ">f4")}


def idx_bytes(array: Array) -> bytes:
    """Return an array in the IDX format."""
    code, order = CODES[array.dtype.name]
    return struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape) + array.astype(order).tobytes()


@pytest.fixture
def mnist(tmp_path: Path) -> dict[str, Array]:
    """MNIST's four files in a small: train plain, test gzipped."""
    rng = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte": rng.integers(0, 256, (60, 28, 28), dtype=np.uint8),
        "train-labels-idx1-ubyte": rng.integers(0, 10, 60, dtype=np.uint8),
        "t10k-images.idx3-ubyte.gz": rng.integers(0, 256, (10, 28, 28), dtype=np.uint8),
        "t10k-labels.idx1-ubyte.gz": rng.integers(0, 10, 10, dtype=np.uint8),
    }
    for name, array in arrays.items():
        data = idx_bytes(array)
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return arrays


def test_mnist_files_plain_and_gzipped(tmp_path: Path, mnist: dict[str, Array]) -> None:
    splits = read(f"idx:{tmp_path}")
    assert list(splits) == ["train", "test"]
    assert np.array_equal(splits["train"]["image"], mnist["train-images-idx3-ubyte"])
    assert np.array_equal(splits["train"]["label"], mnist["train-labels-idx1-ubyte"])
    assert np.array_equal(splits["test"]["image"], mnist["t10k-images.idx3-ubyte.gz"])
    with pytest.raises(SpecError, match="own split"):
        open_source(f"idx:{tmp_path}", PackOptions(test_fraction=0.5))


@pytest.mark.parametrize("dtype", ["int16", "int32", "float32"])
def test_idx_types_come_in_this_machines_byte_order(dtype: str, tmp_path: Path) -> None:
    values = (np.arange(-6, 6).reshape(3, 4) * 300).astype(dtype)
    (tmp_path / "train-images-idx2-x").write_bytes(idx_bytes(values))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(3, dtype=np.uint8)))
    rows = read(f"idx:{tmp_path}")["train"]
    assert rows["image"].dtype == dtype
    assert rows["image"].dtype.isnative
    assert np.array_equal(rows["image"], values)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[:-5],
    "longer": lambda data: data + (gzip.compress(b"\0") if data[:2] == b"\x1f\x8b" else b"\0"),
    "no header": lambda data: data[:3],
    "another file": lambda data: b"PK" + data[2:],
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-images.idx3-ubyte.gz"])
@pytest.mark.usefixtures("mnist")
def test_damaged_idx_files_are_named(damage: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    broken(f"idx:{tmp_path}", str(path))


@pytest.mark.usefixtures("mnist")
def test_a_flipped_bit_in_a_gzip_is_found(tmp_path: Path) -> None:
    path = tmp_path / "t10k-images.idx3-ubyte.gz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    broken(f"idx:{tmp_path}", str(path))


@pytest.mark.usefixtures("mnist")
def test_idx_files_that_do_not_fit_together(tmp_path: Path) -> None:
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(59, np.uint8)))
    broken(f"idx:{tmp_path}", "train-labels-idx1-ubyte", "59 labels for the 60 images")
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    broken(f"idx:{tmp_path}", "train labels are missing")


# --- csv
def test_csv_types_and_classes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("n,x,ok,kind\n1,0.5,true,cat\n-2,1.5,false,ant\n")
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b'n,x,ok,kind\n3,2,true,"c, or\nd"\n'))
    split = open_source(f"csv:{tmp_path}", PackOptions(label="kind"))["train"]
    rows = rows_of(split)
    assert {c.name: (c.dtype, c.num_values) for c in split.columns} == {
        "n": ("int64", None),
        "x": ("float64", None),
        "ok": ("uint8", 2),
        "kind": ("uint8", 3),
    }
    assert split.info["classes"] == {"kind": ["ant", "c, or\nd", "cat"]}
    assert {name: array.tolist() for name, array in rows.items()} == {
        "n": [1, -2, 3],
        "x": [0.5, 1.5, 2.0],
        "ok": [1, 0, 1],
        "kind": [2, 0, 1],
    }
    assert list(read(f"csv:{tmp_path}", columns=("x",), label="n")["train"]) == ["n", "x"]


def test_csv_integers_widen_in_all_files_if_one_has_fractions(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x\n1\n2\n")
    (tmp_path / "b.csv").write_text("x\n0.5\n")
    (tmp_path / "c.csv").write_text("x\n")
    rows = read(f"csv:{tmp_path}")["train"]
    assert rows["x"].dtype == np.float64
    assert rows["x"].tolist() == [1, 2, 0.5]


def test_csv_late_fraction_is_an_error_and_never_rounded(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x\n" + "1000000\n" * 700_000 + "0.5\n")
    broken(f"csv:{tmp_path}/a.csv", f"{tmp_path}/a.csv", "0.5", "int64")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x,y\n1,2\n3,\n", ["column 'y'", "row 1"]),
        ("x,y\n1,\n3,\n", ["column 'y'", "no values"]),
        ("x,y\n1,one\n", ["column 'y'", "--columns", "--label y"]),
        ("x,y\n1,2020-01-01\n", ["column 'y'", "date"]),
        ("x,x\n1,2\n", ["column 'x'", "twice"]),
        ("x,y\n1\n", ["Expected 2 columns"]),
        ("", ["Empty"]),
    ],
)
def test_csv_errors_name_file_and_column(text: str, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    broken(f"csv:{path}", str(path), *words)


def test_csv_files_of_different_schema(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    (tmp_path / "b.csv").write_text("x,z\n1,2\n")
    broken(f"csv:{tmp_path}", f"{tmp_path}/b.csv", f"{tmp_path}/a.csv", "x, z")
    (tmp_path / "b.csv").write_text("x,y\n1,a\n")
    broken(f"csv:{tmp_path}", f"{tmp_path}/b.csv", "'y' is string, but int64")
    broken(f"csv:{tmp_path}/a.csv", "no column 'q'", "x, y", label="q")
    (tmp_path / "b.csv").write_text("x,y\n1,a\n2,\n")
    broken(f"csv:{tmp_path}/b.csv", f"{tmp_path}/b.csv", "'y'", "has no value in row 1", label="y")


def test_split_by_hash_takes_each_row_once_and_keeps_it_there(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text("x\n" + "".join(f"{i}\n" for i in range(1000)))
    first = read(f"csv:{tmp_path}/in", test_fraction=0.25)
    assert sorted([*first["train"]["x"], *first["test"]["x"]]) == list(range(1000))
    assert 200 < len(first["test"]["x"]) < 300
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    again = read(f"csv:{tmp_path}/elsewhere/*.csv", test_fraction=0.25)
    assert np.array_equal(again["test"]["x"], first["test"]["x"])


def test_split_by_names(tmp_path: Path) -> None:
    (tmp_path / "test-1.csv").write_text("x\n1\n")
    (tmp_path / "train-1.csv").write_text("x\n2\n")
    assert {name: rows["x"].tolist() for name, rows in read(f"csv:{tmp_path}").items()} == {"train": [2], "test": [1]}
    with pytest.raises(SpecError, match="own split"):
        open_source(f"csv:{tmp_path}", PackOptions(test_fraction=0.5))


@pytest.mark.parametrize("known", ["train", "test"])
def test_a_name_that_tells_no_split_beside_names_that_do_is_an_error(known: str, tmp_path: Path) -> None:
    """As in IMDB: train, test and unsupervised, of which the last has labels of -1 only."""
    (tmp_path / f"{known}-1.csv").write_text("x\n1\n")
    (tmp_path / "unsupervised-1.csv").write_text("x\n2\n")
    broken(
        f"csv:{tmp_path}",
        f"{tmp_path}/unsupervised-1.csv: its name says neither train nor test, but that of {known}-1.csv says {known}",
        "--test-fraction",
    )
    assert read(f"csv:{tmp_path}", test_fraction=0)["train"]["x"].tolist() == [1, 2]
    assert read(f"csv:{tmp_path}/un*.csv")["train"]["x"].tolist() == [2]


# --- parquet
def png(array: Array, kind: str = "PNG") -> bytes:
    """Return an image file."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def test_parquet_layouts_become_tensors(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    cube = rng.random((7, 2, 3)).astype(np.float32)
    pictures = rng.integers(0, 256, (7, 5, 4, 3), dtype=np.uint8)
    grey = rng.integers(0, 256, (7, 6, 6), dtype=np.uint8)
    tensor_field, tensor = encode(cube, open_column("packed", cube))
    table = pa.table(
        {
            "scalar": pa.array(range(7), pa.int16()),
            "flag": pa.array([True, False] * 3 + [True]),
            "list": pa.array(cube.reshape(7, 6).tolist(), pa.list_(pa.float32())),
            "fixed": pa.FixedSizeListArray.from_arrays(pa.array(cube.reshape(-1)), 6),
            "arrow": pa.ExtensionArray.from_storage(
                pa.fixed_shape_tensor(pa.float32(), (2, 3)),
                pa.FixedSizeListArray.from_arrays(pa.array(cube.ravel()), 6),
            ),
            "binary": pa.array([png(picture) for picture in pictures]),
            "hub": pa.array([{"bytes": png(picture), "path": None} for picture in grey]),
            "kind": pa.array(list("babcabc")).dictionary_encode(),
        }
    ).append_column(tensor_field, tensor)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    split = open_source(f"parquet:{tmp_path}", PackOptions(label="kind"))["train"]
    rows = rows_of(split)
    assert rows["scalar"].tolist() == list(range(7))
    assert rows["flag"].tolist() == [1, 0, 1, 0, 1, 0, 1]
    assert np.array_equal(rows["list"], cube.reshape(7, 6))
    assert np.array_equal(rows["fixed"], cube.reshape(7, 6))
    assert np.array_equal(rows["arrow"], cube)
    assert np.array_equal(rows["packed"], cube)
    assert np.array_equal(rows["binary"], pictures)
    assert np.array_equal(rows["hub"], grey), "all grey stays grey"
    assert rows["kind"].tolist() == [1, 0, 1, 2, 0, 1, 2]
    assert split.info["classes"] == {"kind": ["a", "b", "c"]}
    halves = read(f"parquet:{tmp_path}", label="kind", test_fraction=0.5)
    assert sorted([*halves["train"]["scalar"], *halves["test"]["scalar"]]) == list(range(7))
    assert read(f"parquet:{tmp_path}", columns=("binary",), image_size=2)["train"]["binary"].shape == (7, 2, 2, 3)


def open_column(name: str, array: Array) -> Any:
    """Return the column that an array is."""
    from elastrain.data.columns import Column

    return Column(name=name, dtype=str(array.dtype), shape=array.shape[1:])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (pa.array([1, None]), ["has no value in row 1"]),
        (pa.array([[1, 2], [3]]), ["1 to 2 values"]),
        (pa.array([[3, 4], [1, None]]), ["has no value in row 1"]),
        (pa.array(["a", "b"]), ["string", "--columns"]),
        (pa.array([b"abc", b"abd"]), ["binary", "--columns"]),
        (pa.array([b"\x89PNG oops"] * 2), ["not a readable image"]),
        (pa.array([{"a": 1}] * 2), ["struct"]),
    ],
)
def test_parquet_errors_name_file_and_column(values: pa.Array, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": values}), path)
    broken(f"parquet:{tmp_path}", str(path), "'x'", *words)


def test_parquet_files_that_do_not_fit_together(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"x": [1.0]}), tmp_path / "b.parquet")
    broken(f"parquet:{tmp_path}", f"{tmp_path}/b.parquet", "'x' is double, but int64", f"{tmp_path}/a.parquet")
    pq.write_table(to_table({"x": np.zeros((1, 4), np.uint8)}), tmp_path / "a.parquet")
    pq.write_table(to_table({"x": np.zeros((1, 2, 2), np.uint8)}), tmp_path / "b.parquet")
    broken(f"parquet:{tmp_path}", "[2, 2]", "[4]")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-10])
    broken(f"parquet:{tmp_path}", f"{tmp_path}/b.parquet")


# --- text
def test_text_rows_predict_each_token_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(200)))
    (tmp_path / "b.txt").write_bytes(bytes(range(200, 256)))
    rows = read(f"text:{tmp_path}", context=10, test_fraction=0)["train"]["tokens"]
    assert rows.shape == (25, 11)
    assert rows[:, 1:].ravel().tolist() == list(range(1, 251))
    assert np.array_equal(rows[1:, 0], rows[:-1, -1])


def test_windows_do_not_depend_on_the_pieces() -> None:
    stream = np.arange(1000, dtype=np.uint16)
    whole = Windows(7)
    expected = whole.push(stream)
    for size in (1, 3, 7, 8, 100):
        windows = Windows(7)
        rows = np.concatenate([windows.push(stream[low : low + size]) for low in range(0, 1000, size)])
        assert np.array_equal(rows, expected)
        assert windows.dropped == whole.dropped == 1000 - (len(expected) * 7 + 1)


def test_held_out_text_is_the_end_and_cut_between_characters(tmp_path: Path) -> None:
    for shift in range(4):
        text = "x" * shift + "é漢😀" * 500
        (tmp_path / "a.txt").write_text(text, encoding="utf-8")
        splits = read(f"text:{tmp_path}/a.txt", context=1)
        parts = [bytes([*rows["tokens"][:, 0], rows["tokens"][-1, 1]]) for rows in splits.values()]
        assert b"".join(parts).decode() == text
        assert abs(len(parts[1]) / len(text.encode()) - 0.1) < 0.01
        parts[1].decode()


@pytest.mark.parametrize("text", ["", "short"])
def test_too_little_text(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text)
    broken(f"text:{tmp_path}/a.txt", "a.txt", "--context 64")


def words(count: int, seed: int = 0) -> str:
    """Return text of lines of made-up words."""
    rng = np.random.default_rng(seed)
    known = ["".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(2, 9))) for _ in range(300)]
    picked = [known[i] for i in rng.integers(0, 300, count)]
    return "".join(word + ("\n" if i % 11 == 10 else " ") for i, word in enumerate(picked))


def test_bpe_is_the_same_wherever_it_is_cut(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    text = words(120_000)
    assert len(text) > 2 * BPE_PIECE_BYTES
    (tmp_path / "a.txt").write_text(text)
    options = PackOptions(tokenizer="bpe:500", context=8, test_fraction=0)
    split = open_source(f"text:{tmp_path}/a.txt", options)["train"]
    tokenizer = Tokenizer.from_str(split.files["tokenizer.json"].decode())
    ids = np.concatenate([piece["tokens"] for piece in split.pieces()])
    assert len(list(split.pieces())) > 2
    assert ids.dtype == np.uint16
    assert ids.tolist() == tokenizer.encode(text).ids
    assert tokenizer.decode(ids.tolist()) == text
    assert split.columns[0].num_values == tokenizer.get_vocab_size() == 500
    again = open_source(f"text:{tmp_path}/a.txt", options)["train"]
    assert again.files == split.files


def test_bpe_learns_from_the_training_part_only(tmp_path: Path) -> None:
    text = words(20_000)
    for name, end in {"a": "z" * 5000, "b": "q" * 5000}.items():
        (tmp_path / f"{name}.txt").write_text(text + "\n" + end)
    splits = [open_source(f"text:{tmp_path}/{n}.txt", PackOptions(tokenizer="bpe:400")) for n in "ab"]
    assert splits[0]["train"].files == splits[1]["train"].files


def test_bpe_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc \xff" * 100)
    broken(f"text:{tmp_path}/a.txt", f"{tmp_path}/a.txt", "byte 4", "--tokenizer bytes", tokenizer="bpe:300")
    with pytest.raises(SpecError, match="256 bytes"):
        open_source(f"text:{tmp_path}/a.txt", PackOptions(tokenizer="bpe:10"))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    broken(f"text:{tmp_path}/a.txt", "pip install 'elastrain[text]'", tokenizer="bpe:300")


# --- images
def save(path: Path, array: Array) -> None:
    """Write an image file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(array, {".jpg": "JPEG", ".bmp": "BMP"}.get(path.suffix, "PNG")))


def test_image_folders(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(20):
        save(tmp_path / "dog" / f"{i}.png", np.full((4, 6, 3), i, np.uint8))
        save(tmp_path / "cat" / f"{i}.bmp", np.full((4, 6), 100 + i, np.uint8))
    split = open_source(f"images:{tmp_path}", PackOptions())["train"]
    rows = rows_of(split)
    assert rows["image"].shape == (40, 4, 6, 3)
    assert split.info["classes"] == {"label": ["cat", "dog"]}
    assert split.columns[1].num_values == 2
    assert np.array_equal(rows["label"], rows["image"][:, 0, 0, 0] < 100)
    assert np.count_nonzero(np.diff(rows["label"].astype(int))) > 5, "classes are mixed"
    halves = read(f"images:{tmp_path}", test_fraction=0.5)
    values = np.concatenate([half["image"][:, 0, 0, 0] for half in halves.values()])
    assert sorted(values) == [*range(20), *range(100, 120)]
    save(tmp_path / "dog" / "big.jpg", rng.integers(0, 256, (30, 20, 3), dtype=np.uint8))
    broken(f"images:{tmp_path}", "pixels where the first image has", "--image-size")
    assert read(f"images:{tmp_path}", image_size=3)["train"]["image"].shape == (41, 3, 3, 3)


def test_image_folders_with_a_split_and_grey(tmp_path: Path) -> None:
    for part, count in {"train": 3, "val": 2}.items():
        for i in range(count):
            save(tmp_path / part / str(i % 2) / f"{i}.png", np.full((5, 5), i, np.uint8))
    splits = read(f"images:{tmp_path}")
    assert {name: rows["image"].shape for name, rows in splits.items()} == {"train": (3, 5, 5), "test": (2, 5, 5)}
    assert read(f"images:{tmp_path}/train")["train"]["image"].shape == (3, 5, 5)
    save(tmp_path / "unsup" / "0" / "0.png", np.zeros((5, 5), np.uint8))
    broken(f"images:{tmp_path}", "unsup/0/0.png: its name says neither train nor test")


def test_broken_images_are_named(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / "a" / f"{i}.png", np.random.default_rng(i).integers(0, 256, (9, 9, 3), dtype=np.uint8))
    data = (tmp_path / "a" / "1.png").read_bytes()
    (tmp_path / "a" / "1.png").write_bytes(data[:-30])
    broken(f"images:{tmp_path}", f"{tmp_path}/a/1.png", "not a readable image")
    (tmp_path / "a" / "1.png").write_bytes(b"")
    broken(f"images:{tmp_path}", f"{tmp_path}/a/1.png")
    (tmp_path / "a" / "1.png").write_bytes(data)
    save(tmp_path / "stray.png", np.zeros((9, 9, 3), np.uint8))
    broken(f"images:{tmp_path}", "stray.png", "class folder")
    save(tmp_path / "b" / "deep.png", np.zeros((9, 9), np.uint16))
    (tmp_path / "stray.png").unlink()
    broken(f"images:{tmp_path}", f"{tmp_path}/b/deep.png", "8 bits")
