"""The verbs of jobs: submit, status, logs and stop."""

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

from elastrain.cluster.verbs import Json, Sets
from elastrain.errors import SpecError

jobs = typer.Typer()

SpecPath = Annotated[str, typer.Argument(metavar="SPEC", help="YAML file of a run")]
Dashboard = Annotated[str | None, typer.Option("--address", help="the cluster's dashboard, http://HOST:8265")]
JobName = Annotated[str | None, typer.Argument(help="the name that submit gave it")]


@jobs.command()
def submit(
    spec: SpecPath,
    sets: Sets = None,
    address: Dashboard = None,
    shared: Annotated[list[str] | None, typer.Option(help="a folder that all its machines have mounted")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="show progress until the end, and the result")] = False,
    rayjob: Annotated[
        str | None, typer.Option(metavar="CLUSTER", help="print it for `kubectl create`, for a cluster's YAML file")
    ] = None,
    as_json: Json = False,
) -> None:
    """Send a run to a cluster; it goes on there when this command has ended."""

    def run() -> tuple[dict[str, Any], str]:
        if rayjob is not None:
            return _rayjob(spec, sets or [], rayjob, sent=bool(address or shared or follow))
        from elastrain.cluster.jobs import follow_job
        from elastrain.cluster.jobs import submit as submit_run
        from elastrain.spec.document import read_train

        job = submit_run(read_train(spec, sets or []), address=address, shared=shared or [])
        found = follow_job(job) if follow else {"job": job.id, "run": job.run, "address": job.address}
        return found, "\n".join(f"{key}: {value}" for key, value in found.items())

    _print(run, as_json=as_json)


@jobs.command()
def status(job: JobName = None, address: Dashboard = None, as_json: Json = False) -> None:
    """Say how a cluster's job is; how all its jobs are where none is named."""
    from elastrain.cluster.jobs import as_text, read_status

    _print(lambda: (found := read_status(job, address=address), as_text(found)), as_json=as_json)


@jobs.command()
def logs(
    job: str,
    address: Dashboard = None,
    follow: Annotated[bool, typer.Option("--follow", help="go on until the job ends")] = False,
    as_json: Json = False,
) -> None:
    """Print what a cluster's job has written."""
    from elastrain.cluster.jobs import read_lines

    lines = read_lines(job, address=address, follow=follow)
    for line in [json.dumps({"job": job, "lines": list(lines)})] if as_json else lines:
        typer.echo(line)  # and flushed


@jobs.command()
def stop(job: str, address: Dashboard = None, as_json: Json = False) -> None:
    """End a cluster's job after a last checkpoint, and wait for that."""
    from elastrain.cluster.jobs import as_text, stop_job

    _print(lambda: (found := stop_job(job, address=address), as_text(found)), as_json=as_json)


def _rayjob(spec: str, sets: list[str], cluster_spec: str, *, sent: bool) -> tuple[dict[str, Any], str]:
    """Return a run as what `kubectl create` is given; raises SpecError for options that need it to be sent."""
    if sent:
        raise SpecError("--rayjob prints the run and sends nothing: leave out --address, --shared and --follow")
    from elastrain.cluster.document import read_cluster
    from elastrain.cluster.rayjob import as_text, run_manifests
    from elastrain.spec.document import read_train

    document = read_cluster(cluster_spec)
    files = run_manifests(read_train(spec, sets), document)
    return {"files": files}, as_text(files, document)


def _print(run: Callable[[], tuple[dict[str, Any], str]], *, as_json: bool) -> None:
    found, text = run()
    typer.echo(json.dumps(found, default=str) if as_json else text)
