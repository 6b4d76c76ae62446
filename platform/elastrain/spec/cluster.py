"""The spec of a cluster: the machines that a run may have, whoever lends them, and what they cost when nobody works.

Nothing here opens a file or knows Ray. What the types cannot say goes into `override`, which `cluster check` checks.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from elastrain.spec.accelerators import ACCELERATORS, TPUS, resource_of
from elastrain.spec.offers import KIND, PREFIX, offer_of
from elastrain.spec.problems import nearest
from elastrain.spec.providers import Aws, Azure, Gcp, KubeRay, Local, OnPrem, Text
from elastrain.spec.train import Model, NonNegativeInt, PositiveInt, WholeNumber, wrong

KIND_LABEL = "ray.io/accelerator-type"  # of nodes that have accelerators, with their kind
LABEL_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_LABEL_DOMAIN = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")
_CLOSING = ("RAY_AUTH_", "RAY_USE_TLS", "RAY_TLS_", "RAY_ENABLE_K8S_TOKEN_AUTH")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PATH = r"^/[A-Za-z0-9._/-]*[A-Za-z0-9._-]$"
AbsolutePath = Annotated[str, Field(pattern=_PATH)]
_NAME = r"^[a-z]([a-z0-9-]{0,28}[a-z0-9])?$"
_OVERRIDE = "merged last into what is rendered: for what the types here do not know"
_Free = dict[str, Any]
_CLOUD = {
    "instance": "the type of the machine",
    "identity": "without one of few rights, Ray would make one of many",
}
_NEEDED = {"aws": _CLOUD, "gcp": _CLOUD, "azure": _CLOUD, "kuberay": {"identity": "the service account of the pods"}}
_HOSTS = dict.fromkeys(
    ("instance", "identity", "machine_image", "disk_gib", "market", "min", "max", "placement", "idle_timeout_s"),
    "hosts are what they are, and all of them stay up",
)
_PODS = dict.fromkeys(("machine_image", "disk_gib"), "the nodes are Kubernetes' own")
_NAMES = dict.fromkeys(
    ("identity", "machine_image", "disk_gib", "placement", "mounts"), "nodes of this machine have none of their own"
)
_USELESS = {"onprem": _HOSTS, "kuberay": _PODS, "local": _NAMES}


class Accelerator(Model):
    """What computes, and how many of them a node has."""

    type: str = Field(description="the name that Ray knows it under: T4, L4, A100, H100, TPU-V6E, …")
    count: PositiveInt = Field(description="how many on one node")
    topology: Annotated[str, Field(pattern=r"^\d+x\d+(x\d+)?$")] | None = Field(
        default=None, description="TPU: chips of a slice each way, as 2x4; kuberay needs it"
    )

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.type not in ACCELERATORS:
            hint = (
                nearest(self.type, ACCELERATORS) or "; known are T4, L4, L40S, A10G, A100, H100, H200, B200, TPU-V6E, …"
            )
            raise wrong(f"Ray knows no accelerator {self.type!r}{hint}", "type")
        if self.topology and self.type not in TPUS:
            raise wrong(f"topology is for TPUs, and {self.type} is none; remove it", "topology")
        return self

    @property
    def resource(self) -> str:
        """The resource of Ray that counts it: GPU or TPU."""
        return resource_of(self.type)


class Mount(Model):
    """A folder that a node's container sees: exactly one of host, claim and scratch_gib says what it is."""

    path: AbsolutePath = Field(
        description="where the container sees it: an absolute path of letters, digits, ., _ and -"
    )
    host: AbsolutePath | None = Field(
        default=None, description="a folder of the machine: an absolute path of letters, digits, ., _ and -"
    )
    claim: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")] | None = Field(
        default=None, description="kuberay: the name of a PersistentVolumeClaim, in small letters"
    )
    scratch_gib: PositiveInt | None = Field(default=None, description="kuberay: an empty folder that may hold so much")
    read_only: bool = Field(default=False, description="nobody writes into it")

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [name for name in ("host", "claim", "scratch_gib") if getattr(self, name) is not None]
        if len(given) != 1:
            raise wrong(f"give exactly one of host, claim, scratch_gib, got {', '.join(given) or 'none'}", *given)
        return self


class Tls(Model):
    """Ray's gRPC encrypted, both sides showing a certificate of the cluster's own authority.

    `elastrain cluster certificates FOLDER` makes one. Each node makes its own certificate from it when it starts, so
    the image holds Elastrain. The dashboard's HTTP is not part of it: use a tunnel.
    """

    folder: Text | None = Field(
        default=None, description="folder on this machine with ca.crt and ca.key, copied to the nodes; not on kuberay"
    )
    secret_name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")] | None = Field(
        default=None, description="kuberay: the name of a Secret with the keys ca.crt and ca.key"
    )


class Head(Model):
    """The node that drives and never works: it stays on while the cluster is up, so make it small."""

    instance: Text | None = Field(default=None, description="the machine type; on kuberay the type of its node")
    cpus: PositiveInt = Field(description="CPUs of the machine, or of the pod")
    memory_gib: PositiveInt = Field(description="memory of the machine, or of the pod")
    disk_gib: PositiveInt = Field(default=200, description="size of its disk")
    identity: Text | None = Field(
        default=None, description="who it is for the cloud: it starts and ends nodes, and reads and writes runs"
    )
    machine_image: Text | None = Field(default=None, description="an image of its own; else the provider's")
    mounts: tuple[Mount, ...] = Field(default=(), description="folders that its container sees")
    override: _Free = Field(default={}, description=_OVERRIDE)


class Pool(Model):
    """Machines alike, started when a run needs them and ended when it does not."""

    name: Annotated[str, Field(pattern=_NAME)] = Field(
        description="up to 30 small letters, digits and dashes, and begins with a letter"
    )
    instance: Text | None = Field(default=None, description="the machine type; on kuberay the type of its nodes")
    hosts: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9.-]+$")], ...] = Field(
        default=(), description="onprem: the machines, by address or name"
    )
    accelerator: Accelerator | None = Field(default=None, description="what computes on a node; CPUs alone where unset")
    cpus: PositiveInt = Field(description="CPUs that a node lends")
    memory_gib: PositiveInt = Field(description="memory of the machine, or of the pod")
    disk_gib: PositiveInt = Field(default=200, description="size of a node's disk")
    market: Literal["spot", "on_demand"] = Field(
        default="on_demand", description="spot costs less and may be taken away at any time"
    )
    min: NonNegativeInt | None = Field(default=None, description="nodes that are always up; 0 where unset")
    max: PositiveInt | None = Field(default=None, description="most nodes; each may cost money")
    priority: WholeNumber = Field(default=0, description="among pools that fit, the one with the most is tried first")
    idle_timeout_s: PositiveInt = Field(default=300, description="seconds without work after which a node is ended")
    labels: dict[str, str] = Field(default={}, description="labels of the nodes, for selectors of your own")
    placement: Text | None = Field(
        default=None,
        description="close together. aws: a cluster placement group; gcp: a compact placement policy; azure: a zone; "
        "kuberay: the topology key of which all share a value",
    )
    mounts: tuple[Mount, ...] = Field(default=(), description="folders that a node's container sees")
    identity: Text | None = Field(
        default=None, description="who the nodes are for the cloud: to read data and write runs, and nothing else"
    )
    machine_image: Text | None = Field(default=None, description="an image of its own; else the provider's")
    override: _Free = Field(default={}, description=_OVERRIDE)

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.max is not None and self.least > self.max:
            raise wrong(f"min {self.least} is more than max {self.max}", "min", "max")
        return self

    @model_validator(mode="after")
    def _labelled(self) -> Self:
        for key, value in self.labels.items():
            domain, _, name = key.rpartition("/")
            if key.startswith("ray.io/"):
                raise wrong(
                    f"labels: {key!r} is Ray's own; it follows from name, accelerator and market", f"labels.{key}"
                )
            if not LABEL_NAME.fullmatch(name) or (domain and not _LABEL_DOMAIN.fullmatch(domain)):
                raise wrong(f"labels: {key!r} is no key: up to 63 letters, digits, -, _ and .", "labels")
            if value and not LABEL_NAME.fullmatch(value):
                raise wrong(f"labels: {value!r} is no value: up to 63 letters, digits, -, _ and .", "labels")
        return self

    @property
    def least(self) -> int:
        """Nodes that are always up."""
        return len(self.hosts) if self.hosts else self.min or 0

    @property
    def most(self) -> int:
        """Nodes that may be up at once."""
        return len(self.hosts) if self.hosts else self.max or 0

    @property
    def spot(self) -> bool:
        """Whether the nodes may be taken away at any time."""
        return self.market == "spot"

    def node_labels(self) -> dict[str, str]:
        """Return the labels of the pool's nodes: Ray's names for what they are, and the user's own."""
        known = {"ray.io/node-group": self.name, "ray.io/market-type": "spot" if self.spot else "on-demand"}
        kind = {KIND_LABEL: self.accelerator.type} if self.accelerator else {}
        return {**kind, **known, **self.labels}

    def resources(self) -> dict[str, int]:
        """Return what a node lends, by Ray's names; memory is left to Ray, which measures it."""
        found = {"CPU": self.cpus}
        if self.accelerator:
            found |= {self.accelerator.resource: self.accelerator.count, f"{KIND}{self.accelerator.type}": 1}
        return found


class ClusterSpec(Model):
    """A cluster: what `elastrain cluster` takes, as YAML or as this object."""

    kind: Literal["cluster"] = Field(default="cluster", description="what the file holds: a cluster")
    name: Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$")] = Field(
        description="up to 40 small letters, digits and dashes, and begins with a letter"
    )
    provider: Annotated[Aws | Gcp | Azure | OnPrem | KubeRay | Local, Field(discriminator="type")] = Field(
        description="who lends the machines"
    )
    image: Annotated[str, Field(pattern=r"^[a-z0-9][A-Za-z0-9._:/@-]*[:@][A-Za-z0-9._:-]+$")] | None = Field(
        default=None,
        description="the container image, with its tag or digest, as in registry.example.com/elastrain:0.1.0; "
        "all but local need it",
    )
    head: Head = Field(description="the node that drives and never works")
    pools: Annotated[tuple[Pool, ...], Field(min_length=1)] = Field(description="the machines that work")
    tls: Tls | None = Field(default=None, description="encrypts what its processes say; off where unset")
    env: dict[str, str] = Field(default={}, description="environment of all containers; no secrets")
    prices: str | None = Field(
        default=None, description="a table of machine types of your own, relative to this file: see clusters/README.md"
    )
    override: _Free = Field(default={}, description=_OVERRIDE)

    @model_validator(mode="after")
    def _told_apart(self) -> Self:
        names = [pool.name for pool in self.pools]
        if twice := next((at for at, name in enumerate(names) if name in names[:at]), None):
            raise wrong(f"two pools are called {names[twice]!r}", f"pools.{twice}.name")
        if "head" in names:
            raise wrong("a pool cannot be called 'head'", f"pools.{names.index('head')}.name")
        if strange := next((name for name in self.env if not _VARIABLE.fullmatch(name)), None):
            raise wrong(f"env: {strange!r} is no name of a variable: letters, digits and _", f"env.{strange}")
        if closing := next((name for name in self.env if name.startswith(_CLOSING)), None):
            raise wrong(
                f"env: {closing} says who is let in, which token and tls do here; remove the key", f"env.{closing}"
            )
        return self

    @model_validator(mode="after")
    def _lendable(self) -> Self:
        for field, text in _misfits(self):
            raise wrong(text, field, field.rpartition(".")[0])
        return self

    def offers(self) -> dict[str, str]:
        """Return the labels by which the head's node tells runs what its autoscaler can add, for `spec.offers`."""
        return {f"{PREFIX}{pool.name}": offer_of(pool.resources()) for pool in self.pools}

    @property
    def machines(self) -> Mapping[str, Head | Pool]:
        """Head and pools by the keys at which the spec has them."""
        return {"head": self.head, **{f"pools.{at}": pool for at, pool in enumerate(self.pools)}}


def _misfits(spec: ClusterSpec) -> Iterator[tuple[str, str]]:
    """Yield what the provider cannot do or needs and is not told: the field, and a sentence."""
    kind = spec.provider.type
    if (kind == "local") != (spec.image is None):
        yield (
            "image",
            "image: nodes of this machine run in none; remove the key" if spec.image else "missing key 'image'",
        )
    for place, machine in spec.machines.items():
        yield from _machine_misfits(kind, place, machine)
    for at, pool in enumerate(spec.pools):
        yield from _pool_misfits(kind, f"pools.{at}", pool)
    if kind == "onprem" and len(spec.pools) > 1:
        yield "pools.1", "Ray's provider for hosts has one kind of worker: give one pool, or use kuberay for several"
    if spec.tls is not None:
        yield from _tls_misfits(kind, spec.tls)
    if spec.provider.type == "kuberay" and not spec.provider.spot_nodes and any(pool.spot for pool in spec.pools):
        at = next(at for at, pool in enumerate(spec.pools) if pool.spot)
        yield f"pools.{at}.market", "spot: missing key 'provider.spot_nodes', by which Kubernetes tells such nodes"
    if kind == "azure" and len({machine.identity for machine in spec.machines.values()}) > 1:
        yield "pools.0.identity", "Ray gives all nodes on azure one identity: give head and pools the same"


def _tls_misfits(kind: str, tls: Tls) -> Iterator[tuple[str, str]]:
    name, other = ("secret_name", "folder") if kind == "kuberay" else ("folder", "secret_name")
    if kind == "local":
        yield "tls", "tls: nodes of this machine speak to nobody else; remove the key"
    elif getattr(tls, name) is None or getattr(tls, other) is not None:
        yield "tls", f"on {kind} tls has the key '{name}', and nothing else"


def _machine_misfits(kind: str, place: str, machine: Head | Pool) -> Iterator[tuple[str, str]]:
    for name, why in _NEEDED.get(kind, {}).items():
        # Where a pod of the head is given no service account, the operator makes one that may start and end its pods.
        if getattr(machine, name) is None and not (kind == "kuberay" and place == "head"):
            yield f"{place}.{name}", f"{place}: missing key '{name}': {why}"
    given = {
        name for name in machine.model_fields_set if getattr(machine, name) != type(machine).model_fields[name].default
    }
    for name in sorted(_USELESS.get(kind, {}).keys() & given):
        yield f"{place}.{name}", f"{place}.{name}: {_USELESS[kind][name]}; remove the key"
    for at, mount in enumerate(machine.mounts):
        if kind != "kuberay" and mount.host is None:
            yield f"{place}.mounts.{at}", f"{place}.mounts.{at}: on {kind} a mount is a folder of the host; give host"


def _pool_misfits(kind: str, place: str, pool: Pool) -> Iterator[tuple[str, str]]:
    if (kind == "onprem") != bool(pool.hosts):
        text = "missing key 'hosts': the machines" if kind == "onprem" else f"hosts are for onprem, not {kind}"
        yield f"{place}.hosts", f"{place}: {text}"
    if kind != "onprem" and pool.max is None:
        yield f"{place}.max", f"{place}: missing key 'max' (most nodes; each may cost money)"
    tpu = pool.accelerator is not None and pool.accelerator.resource == "TPU"
    if tpu and kind not in ("gcp", "kuberay"):
        yield f"{place}.accelerator", f"{place}.accelerator: {kind} lends no TPUs; gcp and kuberay do"
    if tpu and kind == "kuberay" and pool.accelerator is not None and not pool.accelerator.topology:
        yield f"{place}.accelerator", f"{place}.accelerator: missing key 'topology', by which Kubernetes finds TPUs"
    if tpu and kind == "gcp" and not pool.machine_image:
        yield f"{place}.machine_image", f"{place}: missing key 'machine_image': the TPU's runtime, as v2-alpha-tpuv6e"
    if tpu and kind == "kuberay" and pool.accelerator is not None and pool.accelerator.type in TPUS[:2]:
        yield f"{place}.accelerator.type", f"{place}.accelerator: Kubernetes lends no {pool.accelerator.type}"
    if kind == "aws" and pool.machine_image and not pool.machine_image.startswith("ami-"):
        yield f"{place}.machine_image", f"{place}.machine_image: on aws an image is called ami-…"
