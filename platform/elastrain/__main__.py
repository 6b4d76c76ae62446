"""The verbs of the command line: parse, call, print. Ray and torch are loaded by the verbs that need them."""

import json
import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Annotated, Any

import typer

from elastrain.cluster.job_verbs import jobs
from elastrain.cluster.verbs import Json, Sets, cluster
from elastrain.errors import ElastrainError, Interrupted, SpecError

app = typer.Typer(
    name="elastrain",
    help="Elastic, exact training on Ray: from rows to a trained model.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(jobs)
app.add_typer(cluster, name="cluster")

SpecPath = Annotated[str, typer.Argument(metavar="SPEC", help="YAML file of a run")]
Address = Annotated[str | None, typer.Option(help="a running Ray (auto, HOST:PORT); a local one is started without")]
Shared = Annotated[list[str] | None, typer.Option(help="a folder that all its machines have mounted")]


@app.command()
def pack(
    source: Annotated[
        str, typer.Argument(help="digits, or KIND:PATH with KIND idx, csv, parquet, text, images, hf, delta, iceberg")
    ],
    out: Annotated[str, typer.Argument(help="folder or URL; gets train/ and, where there is a split, test/")],
    context: Annotated[int, typer.Option(help="text: tokens a row, and one more as the last target")] = 64,
    tokenizer: Annotated[str, typer.Option(help="text: bytes or bpe:SIZE")] = "bytes",
    test_fraction: Annotated[float | None, typer.Option(help="share held out; the source's own split if unset")] = None,
    codec: Annotated[str, typer.Option(help="none, lz4, zstd or snappy")] = "lz4",
    row_group_mib: Annotated[float, typer.Option(help="decoded size of a row group")] = 1.0,
    shard_mib: Annotated[float, typer.Option(help="decoded size of a shard")] = 128.0,
    image_size: Annotated[int | None, typer.Option(help="images: scale and crop to this height and width")] = None,
    label: Annotated[str | None, typer.Option(help="csv, parquet: the column whose texts become classes")] = None,
    columns: Annotated[str | None, typer.Option(help="csv, parquet: the columns to keep, as a,b,c")] = None,
    expect: Annotated[str | None, typer.Option(help="what the columns must be, as x:float64,img:uint8[8,8]")] = None,
    classes: Annotated[int | None, typer.Option(help="how many classes labels have; others are refused")] = None,
    nulls: Annotated[str, typer.Option(help="csv, parquet: rows that lack a value: error or drop")] = "error",
    non_finite: Annotated[str, typer.Option(help="csv, parquet: NaN and infinity: error, drop or keep")] = "error",
    duplicates: Annotated[str, typer.Option(help="equal rows: keep, count, or drop all but the first")] = "keep",
    key: Annotated[str | None, typer.Option(help="csv, parquet: the column that tells duplicates; else all")] = None,
    documents: Annotated[str | None, typer.Option(help="text: one is a file, blank, line or column:NAME")] = None,
    near: Annotated[float | None, typer.Option(help="documents this alike, 0.8 say, are duplicates too")] = None,
    split: Annotated[str | None, typer.Option(help="tables, documents: shares, as train=0.8,val=0.1,test=0.1")] = None,
    by: Annotated[str | None, typer.Option(help="csv, parquet: rows alike in this column share a split")] = None,
    license_name: Annotated[str | None, typer.Option("--license", help="noted in the card")] = None,
    origin: Annotated[str | None, typer.Option("--source", help="where the data come from, noted in the card")] = None,
    encrypt: Annotated[str | None, typer.Option(metavar="KEY", help="the name of a key to encrypt with")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace another dataset there")] = False,
    address: Address = None,
    shared: Shared = None,
    as_json: Json = False,
) -> None:
    """Turn digits, IDX, CSV, Parquet, text or images into packed, checksummed Parquet."""
    checks: dict[str, Any] = {"expect": expect, "classes": classes, "nulls": nulls, "non_finite": non_finite}
    rows: dict[str, Any] = {"duplicates": duplicates, "key": key, "split": split, "by": by}
    more: dict[str, Any] = {"documents": documents, "near": near, "license": license_name, "origin": origin}
    given: dict[str, Any] = {"context": context, "tokenizer": tokenizer, "test_fraction": test_fraction, "codec": codec}
    given |= {"image_size": image_size, "label": label, "encrypt": encrypt, "overwrite": overwrite}

    def run() -> tuple[dict[str, Any], str]:
        from elastrain.data.card import as_text
        from elastrain.data.pack import pack_dataset
        from elastrain.data.preparation import Preparation
        from elastrain.data.sources import PackOptions
        from elastrain.observe.progress import pack_progress

        options = PackOptions(
            **given,
            row_group_bytes=_bytes("--row-group-mib", row_group_mib),
            shard_bytes=_bytes("--shard-mib", shard_mib),
            columns=tuple(columns.split(",")) if columns else None,
            prepare=Preparation(**checks, **rows, **more),
        )
        with _packing(address, source, shared or []), pack_progress() as progress:
            result = pack_dataset(source, out, options, progress=progress)
        verb = "already packed" if result["already"] else "packed"
        splits = ", ".join(f"{name} {split['rows']:,} rows" for name, split in result["splits"].items())
        return result, f"{verb}: {result['dataset']} ({splits}){as_text(result['cards'])}"

    _print(run, as_json=as_json)


@app.command()
def plan(spec: SpecPath, sets: Sets = None, as_json: Json = False) -> None:
    """Print what a run will do: steps, blocks, shuffle, reads, memory. Starts nothing."""

    def run() -> tuple[dict[str, Any], str]:
        from elastrain.data.forecast import as_text, forecast_run
        from elastrain.spec.document import read_train

        found = forecast_run(read_train(spec, sets or []))
        return found, as_text(found)

    _print(run, as_json=as_json)


@app.command()
def check(
    spec: SpecPath, sets: Sets = None, address: Address = None, shared: Shared = None, as_json: Json = False
) -> None:
    """Prove before anything is spent: spec, data, one real step, memory, placement, storage."""

    def run() -> tuple[dict[str, Any], str]:
        from elastrain.elastic.check import as_text, check_run
        from elastrain.spec.document import read_train

        found = check_run(read_train(spec, sets or []), address=address, shared=shared or [])
        return found, as_text(found)

    _print(run, as_json=as_json)


@app.command()
def train(
    spec: SpecPath,
    sets: Sets = None,
    address: Address = None,
    shared: Shared = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="start over: remove what the run has written")] = False,
    attempt: Annotated[
        str | None, typer.Option("--attempt-of", metavar="JOB", help="end as an earlier attempt at this job did")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train; the same command again goes on from the last checkpoint."""

    def run() -> tuple[dict[str, Any], str]:
        from elastrain.elastic.attempts import attempt_of
        from elastrain.elastic.run import train as train_run
        from elastrain.spec.document import read_train

        asked = read_train(spec, sets or [])
        with attempt_of(attempt, asked):
            result = dict(train_run(asked, address=address, fresh=fresh, shared=shared or []).result)
        values = ((name, "not finite" if v is None else f"{v:.4f}") for name, v in result["metrics"].items())
        metrics = ", ".join(f"{name} {value}" for name, value in values)
        resumed = f" (resumed from step {result['resumed_from']})" if result["resumed_from"] else ""
        text = f"step {result['step']}{resumed}, {metrics or 'no evaluation data'}\nreport: {result['run']}/report.html"
        return result, text

    _print(run, as_json=as_json)


@app.command()
def sweep(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="YAML file of a sweep")],
    only_plan: Annotated[bool, typer.Option("--plan", help="print arms, points and cost; start nothing")] = False,
    sets: Sets = None,
    address: Address = None,
    shared: Shared = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="start over: remove what the sweep has written")] = False,
    as_json: Json = False,
) -> None:
    """Find the best settings of a run, or which optimizer is better; the same command again goes on."""

    def run() -> tuple[dict[str, Any], str]:
        from elastrain.sweeps.document import read_sweep
        from elastrain.sweeps.forecast import as_text, forecast_sweep

        asked = read_sweep(spec, sets or [])
        if only_plan:
            found = forecast_sweep(asked, ask=_asking(address))
            return found, as_text(found)
        from elastrain.sweeps.run import sweep as run_sweep

        done = run_sweep(asked, address=address, fresh=fresh, shared=shared or [])
        return dict(done.result), done.as_text()

    _print(run, as_json=as_json)


@app.command()
def verify(
    spec: SpecPath,
    history: Annotated[str, typer.Option(help="numbers of workers, and kill@N, stop@N, drain@N, node@N at step N")],
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Train undisturbed and through a history of kills and resizes; compare both to the bit."""
    found: dict[str, Any] = {}

    def run() -> tuple[dict[str, Any], str]:
        from elastrain.elastic.verify import as_text, verify_run
        from elastrain.spec.document import read_train

        found.update(verify_run(read_train(spec, sets or []), history, say=lambda text: typer.echo(text, err=True)))
        return found, as_text(found)

    _print(run, as_json=as_json)
    if not found["equal"]:
        # Nothing that a user, the data or the machine did may make the two differ: it is a bug of ours.
        raise ElastrainError(f"the disturbed run came out differently: {found['difference']}; please report it")


@cluster.command("local")
def cluster_local(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="YAML file of a cluster of provider local")],
    no_capacity: Annotated[
        list[str] | None, typer.Option(metavar="POOL", help="a pool that launches nothing (repeatable)")
    ] = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Hold a cluster on this machine until Ctrl-C: Ray's real autoscaler, from zero nodes whose GPUs are names."""
    from elastrain.cluster.check import check_cluster
    from elastrain.cluster.document import read_cluster
    from elastrain.elastic.local_autoscaling import LocalAutoscaling, as_text, hold

    document = read_cluster(spec, sets or [])
    check_cluster(document)

    def show(found: LocalAutoscaling) -> None:
        places = {"address": found.address, "dashboard": found.dashboard, "no_capacity": str(found.lacking)}
        print(json.dumps(places) if as_json else as_text(found, document.spec), flush=True)

    hold(document.spec, no_capacity or [], show=show)


@app.command()
def report(
    run_path: Annotated[str, typer.Argument(metavar="RUN", help="a run's folder or URL")], as_json: Json = False
) -> None:
    """Print what a run came to and where its time went; writes report.html into the run."""

    def run() -> tuple[dict[str, Any], str]:
        from elastrain.observe.report import as_text, read_report, write_html

        found = read_report(run_path)
        page = "" if as_json else f"\npage: {write_html(run_path, found)}"
        return found, as_text(found, run_path) + page

    _print(run, as_json=as_json)


@app.command()
def export(
    run_path: Annotated[str, typer.Argument(metavar="RUN", help="a run's folder or URL")],
    out: Annotated[str, typer.Argument(help="the safetensors file to write")],
    step: Annotated[int | None, typer.Option(help="the checkpoint's step; the newest if unset")] = None,
    weights: Annotated[str, typer.Option(help="model, or ema for the averaged weights")] = "model",
    as_json: Json = False,
) -> None:
    """Write a run's weights as one safetensors file."""

    def run() -> tuple[dict[str, Any], str]:
        from elastrain.training.export import export_weights

        found = export_weights(run_path, out, step=step, weights=weights)
        return found, f"{found['file']}: {weights} of step {found['step']}, sha256 {found['weights_sha256']}"

    _print(run, as_json=as_json)


@app.command()
def doctor(
    url: Annotated[str | None, typer.Argument(help="where runs or data are to be; this machine alone if unset")] = None,
    security: Annotated[bool, typer.Option("--security", help="try how closed a running cluster is")] = False,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Try this machine and a storage: libraries, limits, writes, clocks; or how closed a cluster is (--security)."""
    found: dict[str, Any] = {}

    def run() -> tuple[dict[str, Any], str]:
        from elastrain.doctor import as_text, examine, examine_cluster

        if (url if security else address) is not None:
            raise SpecError("doctor takes either a storage, or --security and the --address of a cluster")
        found.update(examine_cluster(address) if security else examine(url))
        return found, as_text(found)

    _print(run, as_json=as_json)
    from elastrain.doctor import failure

    if error := failure(found):
        raise error


@app.command()
def audit(
    url: Annotated[str, typer.Argument(metavar="STORAGE", help="the folder or URL that runs are stored in")],
    as_json: Json = False,
) -> None:
    """Print who submitted, started, resumed, stopped and deleted which runs of a storage, and when."""

    def run() -> tuple[dict[str, Any], str]:
        from elastrain.observe.actions import as_text, read_actions

        found = read_actions(url)
        return {"storage": url, "actions": found}, as_text(found)

    _print(run, as_json=as_json)


@app.command()
def schema(as_json: Json = False) -> None:
    """Print the JSON Schema of specs, for editors."""

    def run() -> tuple[dict[str, Any], str]:
        from elastrain.spec.document import schema as spec_schema

        found = spec_schema()
        return found, json.dumps(found, indent=1)

    _print(run, as_json=as_json)


def _asking(address: str | None) -> Callable[[Any], int] | None:
    """Return what asks the Ray at an address how many trials it holds; None without one, or for this machine's own."""
    if address is None or address == "local":
        return None
    from elastrain.sweeps.pool import ask_cluster

    return partial(ask_cluster, address)


def _packing(address: str | None, source: str, shared: list[str]) -> AbstractContextManager[None]:
    """Return the Ray that packs; its machines must see what is read."""
    from elastrain.data.pack import machine_cpus
    from elastrain.data.sources import read_by_tasks
    from elastrain.elastic.session import ray_session

    return ray_session(address, cpus=machine_cpus(), seen=read_by_tasks(source), shared=shared)


def _bytes(option: str, mib: float) -> int:
    """Return MiB as bytes; raises SpecError for infinity and what is no number, which Python reads as floats."""
    if not math.isfinite(mib):
        raise SpecError(f"{option} {mib}: expected a finite number of MiB, such as 1")
    return int(mib * (1 << 20))


def _print(run: Callable[[], tuple[dict[str, Any], str]], *, as_json: bool) -> None:
    """Run a verb and print its result: one JSON object as the last line of stdout, or text."""
    found, text = run()
    print(json.dumps(found, default=str) if as_json else text)


def main() -> None:
    """Run the command line and leave with the exit code that belongs to what happened."""
    try:
        app(standalone_mode=True)
    except Interrupted as error:
        print(f"elastrain: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except ElastrainError as error:
        print(f"elastrain: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("elastrain: stopped", file=sys.stderr)
        sys.exit(Interrupted.exit_code)


if __name__ == "__main__":
    main()
