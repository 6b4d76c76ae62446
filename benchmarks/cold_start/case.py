"""From the command to the end of the first optimizer step: ours, a plain Ray Train script, a script without Ray."""

from pathlib import Path

from benchmarks.cold_start.data import prepare
from benchmarks.harness import Case, Comparison, Series, Side


def make(work: Path, *, small: bool) -> Case:
    """Return the case over the packed digits; there is no smaller one."""
    del small
    given = {"data": prepare(work)}
    folder = "benchmarks.cold_start"
    sides = (
        Side(name="ours", module=f"{folder}.ours", options=given),
        Side(name="Ray Train", module=f"{folder}.ray_train", options=given),
        Side(name="bare script", module=f"{folder}.bare", options=given, note="no Ray, one process"),
    )
    lines = (
        Comparison(measure="first_step_s", unit="s", better="less", other="Ray Train", target=1.0),
        Comparison(measure="command_s", unit="s", better="less", other="Ray Train"),
        Comparison(measure="first_step_s", unit="s", better="less", other="bare script", role="limit"),
    )
    return Case(name="cold_start", series=(Series(name="two workers", sides=sides, comparisons=lines),))
