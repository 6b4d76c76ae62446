"""The verbs below `elastrain cluster`: check, plan, render and why-up. Ray is loaded by those that plan and look."""

import json
import shlex
from typing import Annotated, Any

import typer

from elastrain.errors import SpecError

cluster = typer.Typer(help="Machines for runs: check, plan and render the spec of a cluster.", no_args_is_help=True)

ClusterPath = Annotated[str, typer.Argument(metavar="SPEC", help="YAML file of a cluster")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="change a field of the spec (repeatable)")
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object as the last line of stdout")]


@cluster.command("check")
def cluster_check(spec: ClusterPath, sets: Sets = None, as_json: Json = False) -> None:
    """Prove a cluster's spec offline: its own rules, Ray's and KubeRay's, prices, and that nothing is left open."""

    def run() -> tuple[dict[str, Any], str]:
        from elastrain.cluster.check import as_text, check_cluster
        from elastrain.cluster.document import read_cluster

        found = check_cluster(read_cluster(spec, sets or []))
        return found, as_text(found)

    _print(*run(), as_json=as_json)


@cluster.command("plan")
def cluster_plan(
    spec: ClusterPath,
    run_spec: Annotated[str, typer.Argument(metavar="RUN", help="YAML file of a run")],
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Print which nodes a run would start, what never fits, cost, power, time to the first step. Starts nothing.

    `--set` changes the run.
    """

    def run() -> tuple[dict[str, Any], str]:
        from elastrain.cluster.check import check_cluster
        from elastrain.cluster.document import read_cluster
        from elastrain.cluster.forecast import as_text, forecast_cluster
        from elastrain.spec.document import read_train

        document = read_cluster(spec)
        check_cluster(document)
        found = forecast_cluster(document.spec, read_train(run_spec, sets or []))
        return found, as_text(found)

    _print(*run(), as_json=as_json)


@cluster.command("render")
def cluster_render(
    spec: ClusterPath,
    out: Annotated[
        str | None, typer.Option(help="folder for the files; on stdout, one after the other, if unset")
    ] = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Write what `ray up` or `kubectl apply` is given; checks the spec first."""

    def run() -> tuple[dict[str, Any], str]:
        from elastrain.cluster.check import check_cluster
        from elastrain.cluster.document import read_cluster
        from elastrain.cluster.render import as_yaml, manifests, next_steps, write

        document = read_cluster(spec, sets or [])
        check_cluster(document)
        if not manifests(document.spec):
            raise SpecError(f"{spec}: there is nothing to render; start it: elastrain cluster local {spec}")
        if out is not None:
            paths = write(document.spec, out)
            start, dashboard = next_steps(document.spec, paths)
            told = (*paths, f"start it:      {start}", f"its dashboard: {dashboard}    # http://127.0.0.1:8265")
            return {"files": paths, "start": start, "dashboard": dashboard}, "\n".join(told)
        files = manifests(document.spec)
        texts = (as_yaml(data, spec_name=document.spec.name) for data in files.values())
        return {"files": files}, "---\n".join(texts).rstrip()

    _print(*run(), as_json=as_json)


@cluster.command("certificates")
def cluster_certificates(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="has the authority, ca.crt and ca.key; made if missing")
    ],
    host: Annotated[list[str] | None, typer.Option(help="a name or address beside this machine's own")] = None,
    out: Annotated[str | None, typer.Option(help="folder for the certificate; FOLDER if unset")] = None,
    as_json: Json = False,
) -> None:
    """Make certificates with which Ray encrypts its gRPC: an authority, and from it this machine's own."""

    def run() -> tuple[dict[str, Any], str]:
        from elastrain.cluster.certificates import make_certificates

        found = make_certificates(folder, host or [], out=out)
        return found, "\n".join(f"export {name}={shlex.quote(value)}" for name, value in found["environment"].items())

    _print(*run(), as_json=as_json)


@cluster.command("why-up")
def cluster_why_up(
    spec: Annotated[str | None, typer.Argument(metavar="[SPEC]", help="YAML file of the cluster, for prices")] = None,
    address: Annotated[str | None, typer.Option(help="the Ray to look at: auto or HOST:PORT")] = None,
    as_json: Json = False,
) -> None:
    """Name what keeps each node alive (actor, task, placement group, object, request), and its price an hour."""

    def run() -> tuple[dict[str, Any], str]:
        from elastrain.cluster.document import read_cluster
        from elastrain.cluster.pins import look
        from elastrain.cluster.why_up import as_text, explain

        document = read_cluster(spec) if spec else None
        found = explain(*look(address), document.spec if document else None)
        return found, as_text(found)

    _print(*run(), as_json=as_json)


def _print(found: dict[str, Any], text: str, *, as_json: bool) -> None:
    typer.echo(json.dumps(found, default=str) if as_json else text)
