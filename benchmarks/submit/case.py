"""What sending a run costs beyond plain `ray job submit`; how long `cluster check` takes."""

from pathlib import Path

from benchmarks.harness import Case, Comparison, Series, Side

TURNS = 3  # of each command in a run; a head is started once a run


def make(work: Path, *, small: bool) -> Case:
    """Return the case; the smaller one sends one job each way."""
    del work
    sending = Side(name="ours", module="benchmarks.submit.sending", options={"turns": 1 if small else TURNS})
    lines = (
        Comparison(
            measure="submit_s",
            against="plain_s",
            unit="s",
            better="less",
            other="ours",
            kind="difference",
            target=1.0,
            label="`elastrain submit`, until the job is taken",
            other_label="ray job submit --no-wait of the same files",
        ),
        Comparison(
            measure="submit_cpu_s",
            against="plain_cpu_s",
            unit="s of a processor",
            better="less",
            other="ours",
            kind="difference",
            label="the same, processor time",
            other_label="ray job submit --no-wait of the same files",
        ),
    )
    checking = Side(name="ours", module="benchmarks.submit.checking", options={"turns": 1 if small else TURNS})
    whole = Comparison(
        measure="check_s",
        against="none_s",
        unit="s",
        better="less",
        other="ours",
        kind="difference",
        target=0.5,
        label="`cluster check` of clusters/aws.yaml",
        other_label="no time at all",
    )
    computing = Comparison(
        measure="check_cpu_s",
        against="none_s",
        unit="s of a processor",
        better="less",
        other="ours",
        kind="difference",
        label="the same, processor time",
        other_label="no time at all",
    )
    return Case(
        name="submit",
        series=(
            Series(name="a job is sent", sides=(sending,), comparisons=lines),
            Series(name="a cluster is checked", sides=(checking,), comparisons=(whole, computing)),
        ),
    )
