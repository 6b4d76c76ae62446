"""The images of the ingest case, verified in each way: by hashes, page checksums, tags of pages, or not at all."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq
from benchmarks.ingest.data import pack_images

from elastrain import storage
from elastrain.data.chunks import PackOptions
from elastrain.data.dataset import MANIFEST, Dataset

KEY_VARIABLE = "ELASTRAIN_KEY_BENCHMARK"
KINDS = ("ours", "pages", "unchecked", "encrypted")


def prepare(folder: Path, *, rows: int, kind: str) -> str:
    """Pack the images with our own writer; return the dataset's folder. `kind` is one of KINDS."""
    options = PackOptions(shard_bytes=32 << 20, encrypt="benchmark" if kind == "encrypted" else None)
    url = str(folder / f"verified-{rows}-{kind}")
    if kind == "unchecked":
        with patch.object(pq, "ParquetWriter", _unchecked(pq.ParquetWriter)):  # what is not there cannot be verified
            pack_images(url, rows=rows, options=options)
    else:
        pack_images(url, rows=rows, options=options)
    if kind in ("pages", "unchecked"):
        _forget_hashes(url)
    return url


def _forget_hashes(url: str) -> None:
    """Leave the hashes of row groups out of a manifest, as other writers and older packs do."""
    data = Dataset.open(url)
    bare = replace(data, shards=tuple(replace(shard, xxh3=None) for shard in data.shards))
    storage.put(storage.join(url, MANIFEST), json.dumps(bare.manifest()).encode())


def _unchecked(writer: Any) -> Any:
    return lambda *arguments, **options: writer(*arguments, **{**options, "write_page_checksum": False})
