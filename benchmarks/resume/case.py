"""How long a run that goes on within an epoch waits for its first batch: ours and plain Ray Data, which starts over."""

from pathlib import Path

from benchmarks.harness import Case, Comparison, Series, Side
from benchmarks.ingest.data import BATCH, prepare

ROWS, SMALL_ROWS = 4000 * BATCH, 200 * BATCH
PLACES = {"1 %": 0.01, "50 %": 0.5, "99 %": 0.99}
PEER = "Ray Data"


def make(work: Path, *, small: bool) -> Case:
    """Return the case over the packed images of `ingest`, a million rows an epoch."""
    url = prepare(work, rows=SMALL_ROWS if small else ROWS, codec="lz4")
    sides = [_side(kind, place, url) for place in PLACES for kind in ("ours", PEER)]
    lines = [_line(f"ours at {place}", f"{PEER} at {place}", 1.0, "first batch at") for place in PLACES]
    lines += [_line(f"ours at {place}", "ours at 1 %", 1.1, "first batch at") for place in list(PLACES)[1:]]
    return Case(name="resume", series=(Series(name="within an epoch", sides=tuple(sides), comparisons=tuple(lines)),))


def _side(kind: str, place: str, url: str) -> Side:
    module = "benchmarks.resume.ours" if kind == "ours" else "benchmarks.resume.ray_data"
    return Side(name=f"{kind} at {place}", module=module, options={"url": url, "place": PLACES[place]})


def _line(ours: str, other: str, target: float, label: str) -> Comparison:
    place = ours.rpartition(" at ")[2]
    return Comparison(
        measure="first_batch_s",
        unit="s",
        better="less",
        ours=ours,
        other=other,
        target=target,
        label=f"{label} {place}",
    )
