"""`cluster plan`: which nodes a run would start, what never fits, what it costs and draws, and when it would begin.

Ray's own scheduler decides, asked without a cluster; nothing is started. A run asks for each of its workers as
`elastic.demand` does, for all at once, and Ray packs them; each node then gets a cell.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from elastrain.cluster.node_types import NodeTable, node_table, type_of
from elastrain.errors import ResourceError, SpecError
from elastrain.spec.cluster import ClusterSpec, Pool
from elastrain.spec.train import TrainSpec, WorkersSpec

# From a node that is up to the first step: the autoscaler's loop, and processes that start and import torch.
_BEGIN_S = 20.0
_GPUS = "GPU"


def forecast_cluster(spec: ClusterSpec, run: TrainSpec) -> dict[str, Any]:
    """Return what `run` would start on the cluster of `spec`, from nothing, at its full size.

    `per_h` and `watts` are of all nodes and the head; None
    where the table of types does not say. `first_step_s` is from the submission, with the head up.

    Raises:
        SpecError: The run wants GPUs, the cluster has several kinds, and it names none; or one that is not there.
        ResourceError: No pool can ever hold a worker, or all of them fewer workers than the run needs.
    """
    workers = run.workers
    _check_kind(spec, workers)
    pools = _fitting(spec, workers)
    plain = not any(pool.accelerator for pool in pools)
    from elastrain.cluster.scheduling import Cell, launches  # noqa: PLC0415 -- Ray, once the run is known to fit

    wanted, room = min(workers.max, run.num_slots), sum(fits(pool, workers) * pool.most for pool in pools)
    sizes = _cells(min(wanted, room), max(fits(pool, workers) for pool in pools))
    asked = [Cell(size=1, resources=workers.needs(), plain=plain)] * sum(sizes)
    found = launches(spec.pools, asked)
    held = sum(sizes) - found.num_infeasible
    if held < workers.min:
        text = f"the pools of {spec.name} hold {held} workers of {run.name} at most, and workers.min is {workers.min}"
        raise ResourceError(f"{text}: raise `max` of {pools[0].name}, or lower workers.min")
    table = node_table(spec)
    started = [pool for pool in spec.pools if found.nodes.get(pool.name)]
    lasting = [pool for pool in spec.pools if not pool.spot]
    fallback = launches(lasting, asked) if any(pool.spot for pool in started) else None
    return {
        "run": run.name,
        "cluster": spec.name,
        "accelerator": workers.accelerator,
        "workers": {"min": workers.min, "max": workers.max, "held": held},
        "cells": sizes,
        "never_fit": wanted - held,
        "nodes": [_nodes(spec, table, pool, found.nodes[pool.name]) for pool in started],
        **_totals(spec, table, found.nodes),
        "without_spot": fallback
        and {
            "nodes": fallback.nodes,
            "never_fit": wanted - sum(sizes) + fallback.num_infeasible,
            **_totals(spec, table, fallback.nodes),
        },
        "first_step_s": _first_step_s(spec, table, workers, started),
        "prices_of": table.date,
        "currency": table.currency,
        "warnings": list(_warnings(spec, workers, started, wanted - held)),
    }


def fits(pool: Pool, workers: WorkersSpec) -> int:
    """Return how many workers a node of a pool holds.

    >>> pool = Pool(name="l4", accelerator={"type": "L4", "count": 4}, cpus=48, memory_gib=192, max=1)
    >>> fits(pool, WorkersSpec(cpus=8, gpus=1)), fits(pool, WorkersSpec(cpus=30)), fits(pool, WorkersSpec(gpus=8))
    (4, 1, 0)
    """
    resources = pool.resources()
    return math.floor(min(resources.get(name, 0) / need for name, need in workers.needs().items()) + 1e-9)


def as_text(found: dict[str, Any]) -> str:
    """Return a plan as lines for people."""
    workers = found["workers"]
    on = f" on {found['accelerator']}" if found["accelerator"] else ""
    cells = ", ".join(str(size) for size in found["cells"])
    lines = [
        f"{found['run']} on {found['cluster']}: {workers['held']} of {workers['max']} workers{on}, cells of {cells}"
    ]
    for node in found["nodes"]:
        price = _money(node["per_h"], found["currency"])
        lines.append(
            f"  {node['count']:>3} x {node['pool']:<14} {node['instance'] or '':<26} {price}, {_watts(node['watts'])}"
        )
    lines.append(
        f"cost         {_money(found['per_h'], found['currency'])} with the head ({found['prices_of']}, approximate)"
    )
    lines.append(f"power        {_watts(found['watts'])} under load")
    lines.append(f"first step   about {found['first_step_s']:,.0f} s after it is asked for, with the head up")
    if other := found["without_spot"]:
        nodes = ", ".join(f"{count} x {pool}" for pool, count in other["nodes"].items()) or "nothing"
        lost = f", {other['never_fit']} workers never fit" if other["never_fit"] else ""
        lines.append(f"without spot {nodes}: {_money(other['per_h'], found['currency'])}{lost}")
    return "\n".join([*lines, *(f"warning: {each}" for each in found["warnings"])])


def _check_kind(spec: ClusterSpec, workers: WorkersSpec) -> None:
    """Raise SpecError where the run could be put on several kinds of GPU, or wants one that the cluster lacks."""
    kinds = list(dict.fromkeys(pool.accelerator.type for pool in _with_gpus(spec)))
    kind = workers.accelerator
    if kind is not None and kind not in kinds:
        there = f"{spec.name} has {', '.join(kinds)}" if kinds else f"{spec.name} has no GPUs"
        raise SpecError(f"workers.accelerator {kind}: {there}")
    if workers.gpus and kind is None and len(kinds) > 1:
        text = f"{spec.name} has {', '.join(kinds)}, and a run must not mix them: name one"
        raise SpecError(f"{text}, as in --set workers.accelerator={kinds[-1]}")


def _with_gpus(spec: ClusterSpec) -> list[Any]:
    return [pool for pool in spec.pools if pool.accelerator and pool.accelerator.resource == _GPUS]


def _fitting(spec: ClusterSpec, workers: WorkersSpec) -> list[Pool]:
    """Return the pools that a run's workers may be on, which hold at least one; raises ResourceError without any.

    As in `elastic.demand`: work on CPUs is not put where accelerators are, if the other pools hold `workers.min`.
    """
    found = [pool for pool in spec.pools if fits(pool, workers)]
    plain = [pool for pool in found if not pool.accelerator]
    if not workers.gpus and sum(fits(pool, workers) * pool.most for pool in plain) >= workers.min:
        found = plain
    if not found:
        lent = ", ".join(f"{pool.name} {_lent(pool)}" for pool in spec.pools)
        raise ResourceError(
            f"no pool of {spec.name} can ever hold a worker of {workers.in_words()}: they lend {lent}; "
            f"lower workers.cpus or workers.gpus, or add a pool"
        )
    return found


def _lent(pool: Pool) -> str:
    accelerator = pool.accelerator
    return f"{pool.cpus} CPUs" + (f" and {accelerator.count} {accelerator.type}" if accelerator else "")


def _cells(workers: int, most: int) -> list[int]:
    """Return the sizes of the cells that come of it: whole nodes of the largest pool, and what is left.

    >>> _cells(20, 8)
    [8, 8, 4]
    """
    return [most] * (workers // most) + ([workers % most] if workers % most else [])


def _nodes(spec: ClusterSpec, table: NodeTable, pool: Pool, count: int) -> dict[str, Any]:
    kind = type_of(spec, table, pool)
    price, watts = (kind.price(spot=pool.spot), kind.watts) if kind else (None, None)
    return {
        "pool": pool.name,
        "instance": pool.instance,
        "market": pool.market,
        "count": count,
        "per_h": None if price is None else count * price,
        "watts": None if watts is None else count * watts,
    }


def _totals(spec: ClusterSpec, table: NodeTable, nodes: dict[str, int]) -> dict[str, float | None]:
    """Return price and watts of all nodes and the head; None where the table lacks a number that is needed."""
    head = type_of(spec, table, spec.head)
    each = [_nodes(spec, table, pool, nodes[pool.name]) for pool in spec.pools if nodes.get(pool.name)]
    prices = [node["per_h"] for node in each] + [head.price(spot=False) if head else None]
    watts = [node["watts"] for node in each] + [head.watts if head else None]
    return {"per_h": _sum(prices), "watts": _sum(watts)}


def _sum(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if None in known else round(sum(value for value in known if value is not None), 4)


def _first_step_s(spec: ClusterSpec, table: NodeTable, workers: WorkersSpec, started: Sequence[Pool]) -> float:
    """Return the seconds until the first workers train: all nodes are asked for at once.

    Hosts are up already. Where several pools are started, the slowest to start counts.
    """
    if spec.provider.type == "onprem":
        return _BEGIN_S
    kinds = [type_of(spec, table, pool) for pool in started if fits(pool, workers)]
    return max((kind.start_s if kind else 300.0 for kind in kinds), default=300.0) + _BEGIN_S


def _warnings(spec: ClusterSpec, workers: WorkersSpec, started: Sequence[Pool], lost: int) -> Iterable[str]:
    if lost:
        yield f"{lost} workers never fit: the pools that could hold them have reached their max"
    if not workers.gpus:
        # Only where the pools without accelerators do not hold workers.min.
        idle = [pool.name for pool in started if pool.accelerator and not pool.least]
        if idle:
            yield f"nodes of {', '.join(idle)} would be started for CPUs alone; raise max of a pool without GPUs"
    pinned = [pool.name for pool in spec.pools if pool.least and spec.provider.type != "onprem"]
    if pinned:
        yield f"nodes of {', '.join(pinned)} are up and paid for without any run (min)"


def _money(value: float | None, currency: str) -> str:
    return "price unknown" if value is None else f"{value:,.2f} {currency}/h"


def _watts(value: float | None) -> str:
    return "watts unknown" if value is None else f"{value / 1000:,.2f} kW"
