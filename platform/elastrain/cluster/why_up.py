"""`cluster why-up`: what keeps each node of a running cluster alive, and what that costs an hour."""

from collections.abc import Mapping, Sequence
from typing import Any

from elastrain.cluster.node_types import NodeTable, node_table, type_of
from elastrain.cluster.pins import Node, Pin
from elastrain.spec.cluster import ClusterSpec

MIB = 1 << 20


def explain(nodes: Sequence[Node], pins: Sequence[Pin], spec: ClusterSpec | None) -> dict[str, Any]:
    """Return what `why-up --json` prints; prices are those of the spec's pools, None where nobody says.

    Ray does not tell on which node an object lies: on each that holds at least so much, all are named that may.
    """
    table = node_table(spec) if spec else None
    requested = _requested(nodes, pins)
    found = [_node(node, pins, requested.get(node.id, []), spec, table) for node in nodes]
    prices = [node["per_h"] for node in found]
    return {
        "nodes": sorted(found, key=lambda node: (not node["head"], node["pool"], node["node"])),
        "requests": [pin.what for pin in pins if pin.kind == "request"],
        "per_h": None if None in prices else round(sum(prices), 4),
        "prices_of": table and table.date,
        "currency": table and table.currency,
    }


def as_text(found: Mapping[str, Any]) -> str:
    """Return it as lines for people."""
    lines = []
    for node in found["nodes"]:
        price = "price unknown" if node["per_h"] is None else f"{node['per_h']:,.2f} {found['currency']}/h"
        lines.append(f"{node['pool'] or 'node'} {node['node'][-12:]}: {price}")
        lines += [f"  {pin['kind']}: {pin['what']}" for pin in node["pins"]]
        if not node["pins"]:
            lines.append(f"  nothing keeps it; idle for {node['idle_s']:.0f} s")
    if found["per_h"] is not None:
        lines.append(f"all together {found['per_h']:,.2f} {found['currency']}/h ({found['prices_of']}, approximate)")
    return "\n".join(lines)


def _node(
    node: Node, pins: Sequence[Pin], requests: Sequence[str], spec: ClusterSpec | None, table: NodeTable | None
) -> dict[str, Any]:
    named = [{"kind": pin.kind, "what": pin.what} for pin in pins if pin.node == node.id]
    named += [{"kind": "request", "what": what} for what in requests]
    if node.stored:
        named += [_object(pin) for pin in pins if pin.kind == "object" and pin.size <= node.stored]
    if node.head:
        named = [{"kind": "head", "what": "stays as long as the cluster"}, *named]
    pool = "head" if node.head else node.pool
    named += _least(pool, spec)
    return {
        "node": node.id,
        "pool": pool,
        "head": node.head,
        "per_h": _price(pool, spec, table),
        "idle_s": round(node.idle_s, 1),
        "pins": named,
    }


def _object(pin: Pin) -> dict[str, str]:
    return {"kind": "object", "what": f"{pin.size / MIB:.1f} MiB, {pin.what}"}


def _least(name: str, spec: ClusterSpec | None) -> list[dict[str, str]]:
    least = next((pool.least for pool in spec.pools if pool.name == name), 0) if spec else 0
    return [{"kind": "min", "what": f"the pool keeps {least} up"}] if least else []


def _price(name: str, spec: ClusterSpec | None, table: NodeTable | None) -> float | None:
    if spec is None or table is None:
        return None
    machine = spec.head if name == "head" else next((pool for pool in spec.pools if pool.name == name), None)
    kind = type_of(spec, table, machine) if machine else None
    spot = machine is not None and machine is not spec.head and getattr(machine, "spot", False)
    return kind.price(spot=spot) if kind else None


def _requested(nodes: Sequence[Node], pins: Sequence[Pin]) -> dict[str, list[str]]:
    """Return which requests for resources each node meets, as the autoscaler packs them: on the first that has room."""
    left = {node.id: dict(node.total) for node in nodes}
    met: dict[str, list[str]] = {}
    for pin in pins:
        for bundle in pin.bundles:
            for node, room in left.items():
                if all(room.get(name, 0.0) >= amount for name, amount in bundle.items()):
                    for name, amount in bundle.items():
                        room[name] -= amount
                    if pin.what not in met.setdefault(node, []):
                        met[node].append(pin.what)
                    break
    return met
