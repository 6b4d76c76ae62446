"""`cluster check`: everything that can be known of a cluster before anything is spent, offline.

The spec's own rules, the table of machine types, Ray's and KubeRay's schemas and what they let through, each told at
the line of the spec that is to blame. Loads neither Ray nor torch.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from elastrain.cluster.document import ClusterDocument
from elastrain.cluster.kuberay_rules import operator_findings, policy_findings
from elastrain.cluster.node_types import ESTIMATE, NodeTable, NodeType, node_table, type_of
from elastrain.cluster.ray_up_rules import launcher_findings
from elastrain.cluster.render import manifests
from elastrain.cluster.schemas import kuberay_findings, ray_up_findings
from elastrain.cluster.tokens import unlocked
from elastrain.spec.cluster import ClusterSpec, Head, Pool
from elastrain.spec.problems import Keys, Problem, nearest, refuse
from elastrain.spec.providers import KubeRay


def check_cluster(document: ClusterDocument) -> dict[str, Any]:
    """Return what a sound cluster is: its pools with prices and watts, and the files that it is rendered to.

    Raises:
        SpecError: Something is wrong; a line for each problem.
    """
    spec = document.spec
    table = node_table(spec)
    refuse(list(_type_problems(spec, table)), document.where)
    files = manifests(spec)
    for data in files.values():
        check_manifest(document, data)
    pools = [_pool(spec, table, pool) for pool in spec.pools]
    head = type_of(spec, table, spec.head)
    return {
        "cluster": spec.name,
        "provider": spec.provider.type,
        "prices_of": table.date,
        "currency": table.currency,
        "head": {
            "instance": spec.head.instance,
            "per_h": head and head.price(spot=False),
            "watts": head and head.watts,
        },
        "pools": pools,
        "files": list(files),
    }


def check_manifest(document: ClusterDocument, data: Mapping[str, Any]) -> None:
    """Raise SpecError if something is wrong with one file that was rendered from the spec, a line for each problem."""
    refuse(_problems(document.spec, data), document.where)


def as_text(found: dict[str, Any]) -> str:
    """Return what was found as lines for people."""
    money = found["currency"]
    what = f"renders {', '.join(found['files'])}" if found["files"] else "elastrain cluster local starts it"
    lines = [f"{found['cluster']} ({found['provider']}): sound; {what}"]
    for pool in found["pools"]:
        holds = f"{pool['count']} {pool['accelerator']}" if pool["accelerator"] else f"{pool['cpus']} CPUs"
        price = (
            "price unknown" if pool["per_h"] is None else f"{_mark(pool['per_h_from'])}{pool['per_h']:,.2f} {money}/h"
        )
        watts = "" if pool["watts"] is None else f", {_mark(pool['watts_from'])}{pool['watts']:,.0f} W"
        nodes = f"{pool['min']} to {pool['max']} nodes"
        lines.append(f"  {pool['name']:<14} {nodes:<15} {pool['market']:<10} {holds:<16} {price}{watts} each")
    table = f"table of {found['prices_of']}; ~ is an estimate, --json has the sources; `prices` names one of your own"
    return "\n".join([*lines, table])


def _mark(source: str | None) -> str:
    return "~" if source == ESTIMATE else ""


def _pool(spec: ClusterSpec, table: NodeTable, pool: Pool) -> dict[str, Any]:
    kind = type_of(spec, table, pool)
    return {
        "name": pool.name,
        "instance": pool.instance,
        "market": pool.market,
        "min": pool.least,
        "max": pool.most,
        "priority": pool.priority,
        "cpus": pool.cpus,
        "accelerator": pool.accelerator and pool.accelerator.type,
        "count": pool.accelerator.count if pool.accelerator else 0,
        "per_h": kind and kind.price(spot=pool.spot),
        "per_h_from": kind and table.told(kind.price_from(spot=pool.spot)),
        "watts": kind and kind.watts,
        "watts_from": kind and table.told(kind.watts_from),
    }


def _type_problems(spec: ClusterSpec, table: NodeTable) -> Iterator[Problem]:
    """Yield where a machine is not what the table says of its type."""
    known = table.of(spec.provider.type)
    for place, machine in spec.machines.items():
        keys: Keys = tuple(int(part) if part.isdigit() else part for part in place.split("."))
        kind = type_of(spec, table, machine)
        if kind is None and machine.instance:
            hint = nearest(machine.instance, known) or "; add it to a table of your own, which `prices` names"
            text = f"the table of machine types has no {machine.instance!r} on {spec.provider.type}{hint}"
            yield Problem(keys=(*keys, "instance"), text=text)
        if kind is not None:
            yield from _size_problems(spec, keys, machine, kind)


def _size_problems(spec: ClusterSpec, keys: Keys, machine: Head | Pool, kind: NodeType) -> Iterator[Problem]:
    for name in ("cpus", "memory_gib"):
        asked, there = getattr(machine, name), getattr(kind, name)
        if asked > there:
            yield Problem(keys=(*keys, name), text=f"{asked} is more than the {there} of {machine.instance}")
    accelerator = machine.accelerator if isinstance(machine, Pool) else None
    parts = spec.provider.type in ("kuberay", "local")  # a pod may hold less than its machine
    holds = f"{machine.instance} holds {kind.count} {kind.accelerator}" if kind.accelerator else ""
    if accelerator is None:
        if holds and not parts:
            text = f"{holds}: say so with accelerator, or CPU work will start it"
            yield Problem(keys=(*keys, "accelerator"), text=text, blame=((*keys, "instance"),))
        return
    if accelerator.type != kind.accelerator:
        yield Problem(keys=(*keys, "accelerator"), text=holds or f"{machine.instance} holds no accelerator")
    elif accelerator.count > (kind.count or 0) or (not parts and accelerator.count != kind.count):
        yield Problem(keys=(*keys, "accelerator", "count"), text=holds)


def _problems(spec: ClusterSpec, data: Mapping[str, Any]) -> list[Problem]:
    """Return what is wrong with one rendered file; rules look only at what fits the schema."""
    if not isinstance(spec.provider, KubeRay):
        found = list(ray_up_findings(data)) or [*launcher_findings(data), *unlocked(data)]
        return [Problem(keys=_in_ray_up(spec, path), text=text) for path, text in found]
    if data["kind"] == "NetworkPolicy":
        return [Problem(keys=("provider",), text=text) for _, text in policy_findings(data)]
    found = list(kuberay_findings(data)) or [*operator_findings(data), *unlocked(data)]
    return [Problem(keys=_in_kuberay(path), text=text) for path, text in found]


def _in_ray_up(spec: ClusterSpec, path: Keys) -> Keys:
    """Return the keys of the spec that a place of the `ray up` file comes from: an override's, where there is one."""
    if len(path) > 1 and path[0] == "available_node_types":
        return (*_machine(spec, str(path[1])), "override", *path[2:])
    return ("override", *path)


def _in_kuberay(path: Keys) -> Keys:
    """Return the keys of the spec that a place of a RayCluster or RayJob comes from."""
    rest = path[2:] if path[:2] == ("spec", "rayClusterSpec") else path[1:]
    if rest[:1] == ("headGroupSpec",):
        return ("head", "override", *rest[1:])
    if len(rest) > 1 and rest[0] == "workerGroupSpecs" and isinstance(rest[1], int):
        return ("pools", rest[1], "override", *rest[2:])
    return ("override", *rest) if path[:1] == ("spec",) else ("name",)


def _machine(spec: ClusterSpec, name: str) -> Keys:
    if name == "head":
        return ("head",)
    at = next((at for at, pool in enumerate(spec.pools) if pool.name == name), None)
    return ("pools", at) if at is not None else ("override", "available_node_types", name)
