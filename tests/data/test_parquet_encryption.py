"""Encrypted datasets: the rows and the fingerprint of plain ones, and without the key nothing."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from elastrain import storage
from elastrain.data import outcome, parquet_encryption
from elastrain.data.card import PAGE, Removals, make_card
from elastrain.data.chunks import PackOptions, Split
from elastrain.data.columns import Array, Column
from elastrain.data.dataset import MANIFEST, Dataset, fingerprint
from elastrain.data.reader import _open_local, read_rows, sources_of
from elastrain.data.shards import ShardWriter
from elastrain.encryption import decrypt
from elastrain.errors import DataError, StorageError

COLUMNS = (Column(name="picture", dtype="uint8", shape=(8, 8)), Column(name="label", dtype="int32", shape=()))
ROWS = 3010  # ten row groups


def key_text(fill: int) -> str:
    return base64.b64encode(bytes([fill]) * 32).decode()


def use_key(fill: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process know one key, or none, and nothing of those before."""
    forget()
    monkeypatch.delenv("ELASTRAIN_KEYS", raising=False)
    if fill is None:
        monkeypatch.delenv("ELASTRAIN_KEY_MAIN")
    else:
        monkeypatch.setenv("ELASTRAIN_KEY_MAIN", key_text(fill))


def forget() -> None:
    parquet_encryption._factory.cache_clear()
    _open_local.cache_clear()


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    use_key(1, monkeypatch)
    yield
    forget()


def rows(seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 17, (ROWS, 8, 8), dtype=np.uint8)
    pictures[::100] = np.frombuffer(b"canary!!" * 8, np.uint8).reshape(8, 8)
    return {"picture": pictures, "label": np.arange(ROWS, dtype=np.int32)}


def pack(out: Path, *, encrypt: str | None = "main", seed: int = 0, there: bool = False) -> Dataset:
    """Pack rows with all that `pack_dataset` does around its Ray job, over what is there."""
    options = PackOptions(row_group_bytes=20 << 10, shard_bytes=100 << 10, codec="none", encrypt=encrypt)
    info: dict[str, Any] = {"classes": {"label": ["secret-class"]}}
    split = Split(columns=COLUMNS, chunks=(), reader=Any, info=info, files={outcome.TOKENIZER: b"secret-token"})  # type: ignore[arg-type]
    marker = {"source": "rows", "options": options.identity()}
    old = outcome.find(str(out)) if there else {}
    with outcome.placed(str(out), old, {"train": split}, marker) as place:
        with ShardWriter(place.shards("train"), COLUMNS, options) as writer:
            writer.write(rows(seed))
            shards, columns = writer.finish()
        info["card"] = make_card(
            written=ROWS, removals=Removals(), sums=writer.sums(), options=options, facts={"classes": info["classes"]}
        )
        whole = Dataset(
            url=place.shards("train"),
            columns=columns,
            shards=shards,
            fingerprint=fingerprint(columns, shards),
            packed=True,
            key=encrypt,
            info=info,
        )
        outcome.commit(place, {"train": whole})
    return Dataset.open(str(out / "train"))


def read(data: Dataset) -> dict[str, Array]:
    """Read all rows as a read task does, in a process that knows nothing yet."""
    forget()
    every = np.arange(data.num_rows)
    return read_rows(data.columns, sources_of(data, np.arange(len(data.group_rows))), every)


def is_right(found: dict[str, Array], seed: int = 0) -> bool:
    return all(np.array_equal(found[name], values) for name, values in rows(seed).items())


def test_an_encrypted_dataset_is_the_plain_one_but_for_its_bytes(tmp_path: Path) -> None:
    plain, held, again = pack(tmp_path / "a", encrypt=None), pack(tmp_path / "b"), pack(tmp_path / "c")
    assert plain.fingerprint == held.fingerprint == again.fingerprint
    assert [s.sha256 for s in plain.shards] == [s.content for s in held.shards] == [s.content for s in again.shards]
    assert len({s.sha256 for d in (plain, held, again) for s in d.shards}) == 3 * len(plain.shards) > 3
    assert plain.columns == held.columns
    assert (plain.key, held.key) == (None, "main")
    assert held.info["classes"] == {"label": ["secret-class"]}
    assert is_right(read(held))
    assert is_right(read(plain))
    assert "content" not in (tmp_path / "a" / "train" / MANIFEST).read_text(), "a plain manifest is as it was"
    tokenizer = (tmp_path / "b" / outcome.TOKENIZER).read_bytes()
    assert decrypt(tokenizer, context=outcome.TOKENIZER, where="") == b"secret-token"


def test_nothing_that_is_stored_can_be_read(tmp_path: Path) -> None:
    pack(tmp_path / "plain", encrypt=None)
    pack(tmp_path / "held")
    secrets = [b"canary!!", b"secret-class", b"secret-token", b"picture", b"label", b"fingerprint", b'"std": ']
    secrets += [bytes([1]) * 32, key_text(1).encode(), bytes([1]).hex().encode() * 32]

    def found(folder: Path) -> set[bytes]:
        data = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
        return {secret for secret in secrets if secret in data}

    assert found(tmp_path / "held") == {b"label"}, "which is an option of pack"
    assert found(tmp_path / "plain") >= set(secrets[:7]), "the test can see what is not encrypted"
    with pytest.raises(OSError, match="no decryption found"):
        pq.read_table(tmp_path / "held" / "train" / "part-00000.parquet")
    assert (tmp_path / "plain" / "train" / PAGE).exists()
    pack(tmp_path / "plain", there=True)
    assert not list(tmp_path.rglob(PAGE)), "nor does a page stay when a plain dataset is replaced by an encrypted one"
    assert Dataset.open(str(tmp_path / "held" / "train")).info["card"]["columns"][1]["max"] == ROWS - 1


def test_of_fifty_flipped_bits_in_shards_each_is_found_or_harmless(tmp_path: Path) -> None:
    data = pack(tmp_path)
    path = tmp_path / "train" / data.shards[1].path
    good, rng = path.read_bytes(), np.random.default_rng(5)
    told: list[str] = []
    for place in [*rng.integers(32, len(good) * 8, 50).tolist(), *range(32)]:
        flipped = bytearray(good)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            assert is_right(read(data)), f"bit {place} gave other rows"
            assert place < 32, f"bit {place} passed"  # the mark at the beginning holds no data
        except DataError as error:
            told.append(str(error))
            assert place >= 32
    assert len(told) == 50
    assert all(str(path) in text and "restore the file" in text for text in told)
    path.write_bytes(good)
    assert is_right(read(data))


def test_every_tag_counts_where_no_checksum_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same without page checksums: what is left are the tags of AES-GCM alone."""
    writer, file = pq.ParquetWriter, pq.ParquetFile
    monkeypatch.setattr(pq, "ParquetWriter", lambda *a, **k: writer(*a, **{**k, "write_page_checksum": False}))
    monkeypatch.setattr(pq, "ParquetFile", lambda *a, **k: file(*a, **{**k, "page_checksum_verification": False}))
    data = pack(tmp_path)
    path = tmp_path / "train" / data.shards[0].path
    good, rng, told = path.read_bytes(), np.random.default_rng(6), []
    for place in rng.integers(32, len(good) * 8, 50).tolist():
        flipped = bytearray(good)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(DataError) as caught:
            read(data)
        told.append(str(caught.value))
    assert any("an encrypted page or header is not the one that was written" in text for text in told)


def test_what_is_put_in_a_shards_place_is_refused(tmp_path: Path) -> None:
    data, _ = pack(tmp_path / "a"), pack(tmp_path / "b", seed=1)
    folder = tmp_path / "a" / "train"
    good = (folder / "part-00000.parquet").read_bytes()
    for stranger in (folder / "part-00001.parquet", tmp_path / "b" / "train" / "part-00000.parquet"):
        (folder / "part-00000.parquet").write_bytes(stranger.read_bytes())
        with pytest.raises(DataError, match=r"part-00000.parquet: (the footer is not the one|\d+ bytes where)"):
            read(data)
    (folder / "part-00000.parquet").write_bytes(good)
    assert is_right(read(data))
    (folder / MANIFEST).unlink()
    with pytest.raises(DataError, match=rf"an encrypted Parquet file, and no {MANIFEST} that says with which key"):
        Dataset.open(str(folder))


def test_a_manifest_with_a_flipped_bit_never_opens_as_another_one(tmp_path: Path) -> None:
    data = pack(tmp_path)
    path = tmp_path / "train" / MANIFEST
    good = path.read_bytes()
    first = good.index(b'"encrypted"')
    told = []
    for place in np.random.default_rng(7).integers(first * 8, len(good) * 8, 50).tolist():
        flipped = bytearray(good)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            assert Dataset.open(data.url) == data  # in white space, or bits of base64 that mean nothing
        except (DataError, StorageError) as error:
            told.append(str(error))
    assert len(told) > 40
    assert all(str(path) in text for text in told)


def test_without_the_key_or_with_another_one_nothing_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pack(tmp_path)
    use_key(2, monkeypatch)
    for attempt in (lambda: Dataset.open(data.url), lambda: read(data)):
        with pytest.raises(StorageError, match="the key 'main' does not open what was encrypted"):
            attempt()
    use_key(None, monkeypatch)
    for attempt in (lambda: Dataset.open(data.url), lambda: read(data), lambda: pack(tmp_path / "other")):
        with pytest.raises(StorageError, match="no key 'main': set ELASTRAIN_KEY_MAIN"):
            attempt()
    assert not list((tmp_path / "other").rglob("*.parquet"))
    use_key(1, monkeypatch)
    assert is_right(read(Dataset.open(data.url)))


def test_a_pack_that_is_there_is_known_again_by_its_options(tmp_path: Path) -> None:
    pack(tmp_path)
    there = outcome.find(str(tmp_path))
    assert there["train"].finished
    assert outcome.finished(str(tmp_path), there, there["train"].pack) is not None
    assert there["train"].pack["options"]["encrypt"] == "main"
    assert "encrypt" not in PackOptions().identity(), "what was packed before there was encryption is the same pack"


@pytest.mark.slow
def test_the_command_line_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pack(tmp_path)
    (tmp_path / "task.py").write_text("class Nothing: pass\n")
    document = {
        "name": "x",
        "task": "task.py:Nothing",
        "data": {"train": data.url, "global_batch": 30},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "budget": {"epochs": 1},
    }
    (tmp_path / "spec.yaml").write_text(json.dumps(document))

    def planned() -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "elastrain", "plan", str(tmp_path / "spec.yaml")]
        return subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)

    assert planned().returncode == 0, planned().stderr
    monkeypatch.setenv("ELASTRAIN_KEY_MAIN", key_text(9))
    done = planned()
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (5, 1, "")
    assert done.stderr.startswith(f"elastrain: error: {storage.join(data.url, MANIFEST)} is encrypted: the key 'main'")
    monkeypatch.setenv("ELASTRAIN_KEY_MAIN", key_text(1))
    manifest = json.loads((tmp_path / "train" / MANIFEST).read_text())
    held = bytearray(base64.b64decode(manifest["encrypted"]))
    held[-1] ^= 1
    changed = {**manifest, "encrypted": base64.b64encode(held).decode()}
    (tmp_path / "train" / MANIFEST).write_text(json.dumps(changed))
    done = planned()
    assert (done.returncode, done.stderr.count("\n")) == (4, 1)
    assert "corrupted (not the bytes that were encrypted); restore it, or pack the data again" in done.stderr
