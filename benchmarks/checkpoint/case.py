"""How long a commit holds up training: ours against `torch.save`, and against copying the same bytes in memory."""

from pathlib import Path

from benchmarks.harness import Case, Comparison, Series, Side

MEGABYTES, COMMITS = 400, 3
SMALL_MEGABYTES = 12


def make(work: Path, *, small: bool) -> Case:
    """Return the case over a model and its Adam moments, 400 MB together."""
    given = {
        "megabytes": SMALL_MEGABYTES if small else MEGABYTES,
        "commits": COMMITS,
        "folder": str(work / "checkpoints"),
    }
    folder = "benchmarks.checkpoint"
    sides = (
        Side(name="ours", module=f"{folder}.ours", options=given),
        Side(name="torch.save", module=f"{folder}.torch_save", options={**given, "sync": False}),
        Side(name="torch.save, fsync", module=f"{folder}.torch_save", options={**given, "sync": True}),
        Side(name="memory and disk", module=f"{folder}.memory", options=given),
    )
    lines = (
        Comparison(measure="stall_s", unit="s", better="less", other="torch.save", target=1.0),
        Comparison(measure="stall_s", unit="s", better="less", other="torch.save, fsync"),
        Comparison(measure="stall_s", unit="s", better="less", other="memory and disk", role="limit"),
        Comparison(measure="first_stall_s", unit="s", better="less", other="memory and disk", role="limit"),
        Comparison(measure="write_s", unit="s", better="less", other="torch.save, fsync"),
        Comparison(measure="write_s", unit="s", better="less", other="memory and disk", role="limit"),
        Comparison(measure="load_s", unit="s", better="less", other="torch.save"),
        Comparison(measure="load_s", unit="s", better="less", other="memory and disk", role="limit"),
    )
    return Case(
        name="checkpoint", series=(Series(name="400 MB" if not small else "small", sides=sides, comparisons=lines),)
    )
