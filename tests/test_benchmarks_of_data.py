"""The benchmarks of data: every case runs and does the work that it claims. A file of their own: they take minutes."""

from pathlib import Path

import pytest
from tests.test_benchmarks import small


@pytest.mark.bench
@pytest.mark.timeout(900)
def test_ingest_delivers_every_row_once_an_epoch(work: Path) -> None:
    from benchmarks.ingest.case import SMALL_EPOCHS, SMALL_ROWS
    from benchmarks.ingest.data import WARM

    rows = (WARM + SMALL_EPOCHS + 1) * SMALL_ROWS
    for series in small("ingest", work).values():
        ours, raw = series["ours"], series["raw"]
        assert ours["counters"]["rows"] == raw["counters"]["rows"] == rows
        assert ours["counters"]["object_store_bytes"] == rows * (784 + 1 + 20), "the index takes 20 bytes a row"
        assert ours["digest"] == raw["digest"]


@pytest.mark.bench
@pytest.mark.timeout(900)
def test_s3_ingest_asks_for_each_row_group_in_one_epoch_and_for_nothing_in_the_next(work: Path) -> None:
    from benchmarks.s3_ingest.case import SMALL_ROWS

    (series,) = small("s3_ingest", work).values()
    ours, peer = series["ours"], series["Ray Data"]
    assert ours["counters"]["delivered_bytes"] == peer["counters"]["delivered_bytes"] == SMALL_ROWS * (784 + 1)
    assert ours["counters"]["requests_of_cached_epochs"] == 0
    assert ours["measures"]["requests"] >= ours["counters"]["row_groups"]


@pytest.mark.bench
@pytest.mark.timeout(900)
def test_pack_writes_every_row_on_all_sides(work: Path) -> None:
    from benchmarks.pack.case import SMALL_FILES
    from benchmarks.pack.data import FILE_ROWS

    (series,) = small("pack", work).values()
    rows = SMALL_FILES * FILE_ROWS
    for name, side in series.items():
        removed = {} if name == "Ray Data" else {"removed": 0}
        assert side["counters"] == {"rows": rows, "read": rows, **removed}
        assert side["measures"]["peak_mib"] > 50
    assert len({side["digest"] for side in series.values()}) == 1


@pytest.mark.bench
@pytest.mark.timeout(900)
def test_integrity_cost_reads_the_same_rows_on_all_sides(work: Path) -> None:
    from benchmarks.integrity_cost.case import SMALL_ROWS
    from benchmarks.integrity_cost.data import KINDS

    found = small("integrity_cost", work)
    assert found.keys() == {"read tasks", "ingest"}
    for series in found.values():
        assert series["ours"]["counters"]["rows"] == SMALL_ROWS
        assert {f"cpu_{kind}" for kind in KINDS} < series["ours"]["measures"].keys()
    sizes, marks, hashed = {}, {}, {}
    for kind in KINDS:
        (shard,) = work.glob(f"*-{kind}/part-00000.parquet")
        sizes[kind], marks[kind] = shard.stat().st_size, shard.read_bytes()[:4]
        hashed[kind] = b"xxh3" in (shard.parent / "_manifest.json").read_bytes()
    assert marks == {"ours": b"PAR1", "pages": b"PAR1", "unchecked": b"PAR1", "encrypted": b"PARE"}
    assert hashed == {"ours": True, "pages": False, "unchecked": False, "encrypted": False}
    assert sizes["unchecked"] < sizes["ours"] == sizes["pages"] < sizes["encrypted"], (
        "a checksum takes some bytes a page"
    )
