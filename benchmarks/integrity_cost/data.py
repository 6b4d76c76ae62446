"""The images of the ingest case three times: as `pack` writes them, without page checksums, and encrypted."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq
from benchmarks.ingest.data import pack_images

from elastrain.data.chunks import PackOptions

KEY_VARIABLE = "ELASTRAIN_KEY_BENCHMARK"


def prepare(folder: Path, *, rows: int, kind: str) -> str:
    """Pack the images with our own writer; return the dataset's folder. `kind`: ours, unchecked or encrypted."""
    options = PackOptions(shard_bytes=32 << 20, encrypt="benchmark" if kind == "encrypted" else None)
    url = str(folder / f"integrity-{rows}-{kind}")
    if kind != "unchecked":
        return pack_images(url, rows=rows, options=options)
    with patch.object(pq, "ParquetWriter", _unchecked(pq.ParquetWriter)):  # what is not written cannot be verified
        return pack_images(url, rows=rows, options=options)


def _unchecked(writer: Any) -> Any:
    return lambda *arguments, **options: writer(*arguments, **{**options, "write_page_checksum": False})
