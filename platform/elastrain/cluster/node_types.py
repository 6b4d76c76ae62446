"""Machine types: what a node of each holds, costs, draws and takes to start, in a dated table that users may replace.

In: the table of the package and, where a spec names one, a user's. Out: `NodeType`s by name. Opens these files only.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from elastrain.errors import SpecError
from elastrain.spec.accelerators import ACCELERATORS
from elastrain.spec.cluster import ClusterSpec, Head, Pool
from elastrain.spec.problems import Problem, nearest, refuse, validate
from elastrain.spec.source import load
from elastrain.spec.train import Model, NonNegativeFloat, PositiveFloat, PositiveInt, wrong

ESTIMATE = "estimate"
CLOUDS = ("aws", "gcp", "azure", "onprem")
TABLE = Path(__file__).with_name("node_types.yaml")


class Source(Model):
    """Where figures come from."""

    date: str = Field(description="when it said so, as 2026-11-27")
    url: str = Field(description="where it says so")


class NodeType(Model):
    """One machine type. Where a figure comes from is one of the table's `sources`, or `estimate`."""

    cpus: PositiveInt = Field(description="CPUs of the machine")
    memory_gib: PositiveInt = Field(description="its memory")
    accelerator: str | None = Field(default=None, description="what computes in it, by the name that Ray knows")
    count: PositiveInt | None = Field(default=None, description="how many of them")
    on_demand_per_h: NonNegativeFloat | None = Field(default=None, description="price of an hour")
    spot_per_h: NonNegativeFloat | None = Field(default=None, description="price of an hour that may end early")
    watts: PositiveFloat | None = Field(default=None, description="what it draws under load")
    start_s: PositiveFloat = Field(default=300.0, description="seconds from asking for it until Ray is up on it")
    on_demand_from: str | None = Field(default=None, description="the source of on_demand_per_h")
    spot_from: str | None = Field(default=None, description="the source of spot_per_h")
    watts_from: str | None = Field(default=None, description="the source of watts")

    @model_validator(mode="after")
    def _known(self) -> "NodeType":
        if (self.accelerator is None) != (self.count is None):
            raise wrong("give accelerator and count together", "accelerator", "count")
        if self.accelerator is not None and self.accelerator not in ACCELERATORS:
            hint = nearest(self.accelerator, ACCELERATORS)
            raise wrong(f"Ray knows no accelerator {self.accelerator!r}{hint}", "accelerator")
        return self

    def price(self, *, spot: bool) -> float | None:
        """Return what an hour costs, None where the table does not say."""
        return self.spot_per_h if spot else self.on_demand_per_h

    def price_from(self, *, spot: bool) -> str | None:
        """Return the source of that, None where the table does not say."""
        return self.spot_from if spot else self.on_demand_from


class NodeTable(Model):
    """Machine types by cloud and name, as of a date."""

    date: str = Field(description="when the prices were so, as 2026-11-27")
    currency: str = Field(default="USD", description="what the prices are in")
    sources: dict[str, Source] = Field(default={}, description="who says so, by a name of your own")
    aws: dict[str, NodeType] = Field(default={}, description="instance types of EC2")
    gcp: dict[str, NodeType] = Field(default={}, description="machine types of Compute Engine")
    azure: dict[str, NodeType] = Field(default={}, description="sizes of Azure's virtual machines")
    onprem: dict[str, NodeType] = Field(default={}, description="hosts of your own, by the pool's name, and head")

    def told(self, source: str | None) -> str | None:
        """Return a source as its date and URL, or `estimate`; None where the table does not say."""
        found = self.sources.get(source or "")
        return f"{found.date} {found.url}" if found else source

    def of(self, provider: str) -> Mapping[str, NodeType]:
        """Return the types that a provider lends; Kubernetes may run on any of them, and local seem to be any."""
        if provider in ("kuberay", "local"):
            return {**self.onprem, **self.azure, **self.gcp, **self.aws}
        found: dict[str, NodeType] = getattr(self, provider)
        return found


def node_table(spec: ClusterSpec) -> NodeTable:
    """Return the package's table with what the user's table says in its place; raises SpecError for a wrong table."""
    ours = _read(str(TABLE))
    if spec.prices is None:
        return ours
    own = _read(spec.prices)
    merged = {part: {**getattr(ours, part), **getattr(own, part)} for part in (*CLOUDS, "sources")}
    return own.model_copy(update=merged)


def type_of(spec: ClusterSpec, table: NodeTable, machine: Head | Pool) -> NodeType | None:
    """Return what the table says of a machine; None where it has none of that name, as for hosts without an entry."""
    name = machine.name if isinstance(machine, Pool) else "head"
    return table.of(spec.provider.type).get(machine.instance or name)


def _read(path: str) -> NodeTable:
    source = load(path)
    data: Any = source.data
    if not isinstance(data, dict):
        raise SpecError(f"{path}: expected a table of machine types with date, aws, gcp, azure or onprem")
    table = validate(NodeTable, data, source.where)
    refuse(list(_unknown_sources(table)), source.where)
    return table


def _unknown_sources(table: NodeTable) -> Iterator[Problem]:
    known = [ESTIMATE, *table.sources]
    for cloud in CLOUDS:
        for name, kind in getattr(table, cloud).items():
            for field in ("on_demand_from", "spot_from", "watts_from"):
                source = getattr(kind, field)
                if source is not None and source not in known:
                    text = f"{source!r} is none of the sources, nor {ESTIMATE}{nearest(source, known)}"
                    yield Problem(keys=(cloud, name, field), text=text)
