"""`cluster why-up`: what keeps each node of a running cluster alive, and what that costs an hour."""

from collections.abc import Mapping, Sequence
from typing import Any

from elastrain.cluster.node_types import NodeTable, node_table, type_of
from elastrain.cluster.pins import Bundle, Node, Pin
from elastrain.spec.cluster import ClusterSpec

MIB = 1 << 20


def explain(nodes: Sequence[Node], pins: Sequence[Pin], spec: ClusterSpec | None) -> dict[str, Any]:
    """Return what `why-up --json` prints; prices are those of the spec's pools, None where nobody says.

    Ray does not tell on which node an object lies: on each that holds at least so much, all are named that may. Nor
    does it tell which nodes a request or pending work keeps: such are named as would do.
    """
    table = node_table(spec) if spec else None
    requested = _requested(nodes, pins)
    found = [_node(node, pins, requested.get(node.id, []), spec, table) for node in nodes]
    prices = [node["per_h"] for node in found]
    return {
        "nodes": sorted(found, key=lambda node: (not node["head"], node["pool"], node["node"])),
        "requests": [pin.what for pin in pins if pin.kind == "request"],
        "pending": [pin.what for pin in pins if pin.kind == "pending"],
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
    node: Node, pins: Sequence[Pin], requests: Sequence[Pin], spec: ClusterSpec | None, table: NodeTable | None
) -> dict[str, Any]:
    named = [{"kind": pin.kind, "what": pin.what} for pin in pins if pin.node == node.id]
    named += [{"kind": pin.kind, "what": pin.what} for pin in requests]
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


def _requested(nodes: Sequence[Node], pins: Sequence[Pin]) -> dict[str, list[Pin]]:
    """Return which requests and which pending work each node meets, by id.

    The autoscaler packs them anew at each look, by a score of its own: where several nodes would do, it may keep
    another one than is named here. Pending work needs free room; a request may be met by what is in use.
    """
    total = {node.id: dict(node.total) for node in nodes}
    free = {node.id: dict(node.free) for node in nodes}
    met: dict[str, list[Pin]] = {}
    for pin in pins:
        for node in _places(nodes, free if pin.kind == "pending" else total, pin):
            met.setdefault(node, []).append(pin)
    return met


def _places(nodes: Sequence[Node], room: dict[str, dict[str, float]], pin: Pin) -> set[str]:
    """Take what a pin wants out of the `room` of nodes, and return whose; GPUs last for what wants none."""
    left = {node: dict(has) for node, has in room.items()}
    found: set[str] = set()
    for bundle in pin.bundles:
        spare = sorted(nodes, key=lambda node: "GPU" in node.total and "GPU" not in bundle.resources)
        fits = (node.id for node in spare if bundle.may_be_on(node) and _holds(left[node.id], bundle))
        place = next((node for node in fits if not (bundle.apart and node in found)), None)
        if place is None and pin.whole:
            return set()
        if place is not None:
            found.add(place)
            for name, amount in bundle.resources.items():
                left[place][name] -= amount
    room.update(left)
    return found


def _holds(has: Mapping[str, float], bundle: Bundle) -> bool:
    return all(has.get(name, 0.0) >= amount for name, amount in bundle.resources.items())
