"""How closed a running cluster is: every port asked without a token, addresses, the token's file, secrets, TLS.

Each finding is tried and not guessed. Stands on Ray's inner `GcsClient` (the table of nodes, and where the dashboard
is), on `canonicalize_bootstrap_address_or_die` for `auto`, and on `AuthenticationTokenLoader`.
"""

import json
import os
import socket
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private.authentication import authentication_token_setup as token
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray._raylet import GcsClient  # type: ignore[attr-defined] # compiled
from ray.job_submission import JobDetails

from elastrain.cluster.doors import Answer, Door, Listener, check_tls, knock_all, listeners, speaks_tls
from elastrain.cluster.job_server import JobServer
from elastrain.errors import ElastrainError, ResourceError, SpecError
from elastrain.spec.secrets import secrets_in

Finding = tuple[str, str, str]
"""Name, `ok`, `warn` or `fail`, and what was found."""

CONNECT_S = 5.0
KINDS = {  # a port of a node: the field of Ray's table of nodes
    "raylet": "node_manager_port",
    "object manager": "object_manager_port",
    "runtime env agent": "runtime_env_agent_port",
    "agent": "metrics_agent_port",
    "agent's HTTP": "dashboard_agent_listen_port",
    "metrics": "metrics_export_port",
}
_NUMBERS = (
    "tell numbers to anybody who reaches them; set RAY_enable_metrics_collection=false, DASHBOARD_METRIC_PORT=-1 and "
    "AUTOSCALER_METRIC_PORT=-1 where Ray starts, or let the network close them"
)
_REMEDY = "start Ray with RAY_AUTH_MODE=token and a token on every node"


@dataclass(frozen=True, slots=True)
class Cluster:
    """What Ray's head tells: its address, versions, the dashboard's HOST:PORT, and a mapping a node."""

    address: str
    metadata: Mapping[str, Any]
    dashboard: str | None
    nodes: tuple[Any, ...]


def findings(address: str | None) -> Iterator[Finding]:
    """Yield what was found of the cluster whose Ray is at `address` (HOST:PORT or auto, `RAY_ADDRESS` where unset).

    Raises SpecError for an address of another form, ResourceError if no Ray answers there that lets us in.
    """
    known = _cluster(_found(address))
    jobs, said = _jobs(known)
    here = listeners([known.address, *(node.session_dir for node in known.nodes)], _drivers(jobs))
    answers = knock_all(_doors(known, here))
    yield _version(known)
    yield _token_file()
    yield from _closed(answers)
    yield _addresses(known, here)
    yield said or _secrets(jobs)
    yield _tls(known)


def _found(address: str | None) -> str:
    given = address or os.environ.get("RAY_ADDRESS")
    if not given or given.startswith(("http://", "https://", "ray://")):
        raise SpecError(
            f"{given or 'no cluster is named'}: give Ray's own address, --address HOST:6379 or auto on one of its "
            "machines; the dashboard does not tell all ports"
        )
    try:
        found = str(canonicalize_bootstrap_address_or_die(given))
        host, _, port = found.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
        check_tls(host.strip("[]"), int(port))
    except (OSError, ValueError, ConnectionError) as error:
        reason = str(error).partition(". ")[0]
        raise ResourceError(f"no Ray answers at {given} ({reason}); is it up?") from None
    return found


def _cluster(address: str) -> Cluster:
    token.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        client = GcsClient(address=address)
        nodes = client.get_all_node_info(timeout=CONNECT_S)
        metadata = client.internal_kv_get(b"CLUSTER_METADATA", b"cluster")
        dashboard = client.internal_kv_get(b"dashboard", b"dashboard")
    except Exception as error:  # Ray has a kind of error for each way to fail
        first = str(error).strip().partition("\n")[0][:200]
        raise ResourceError(
            f"{address} does not let us in ({first}); put the cluster's token into ~/.ray/auth_token, or name its file "
            "in RAY_AUTH_TOKEN_PATH; with TLS, set RAY_USE_TLS and RAY_TLS_* as its nodes do"
        ) from error
    alive = tuple(info for info in nodes.values() if info.state == 0)
    return Cluster(address, json.loads(metadata or b"{}"), dashboard.decode() if dashboard else None, alive)


def _jobs(known: Cluster) -> tuple[list[JobDetails], Finding | None]:
    """Return the cluster's jobs, or what is to be said where nobody tells them."""
    if known.dashboard is None:
        return [], ("jobs", "ok", "this cluster takes no jobs: it has no dashboard")
    try:
        return JobServer(f"http://{known.dashboard}").all_jobs(), None
    except ElastrainError:
        text = f"the dashboard at {known.dashboard} cannot be reached from here; look again on the head"
        return [], ("secrets in jobs", "warn", text)


def _drivers(jobs: Iterable[JobDetails]) -> list[int]:
    found = [job.driver_info for job in jobs if job.driver_info is not None]
    return [int(info.pid) for info in found if info.pid]


# --- doors


def _doors(known: Cluster, here: Iterable[Listener]) -> list[Door]:
    """Return all ports of the cluster: those that Ray tells, and what else its processes have open on this machine."""
    found = {Door("GCS", *_split(known.address))}
    if known.dashboard:
        found.add(Door("dashboard and jobs", *_split(known.dashboard)))
    for node in known.nodes:
        ports = {name: int(getattr(node, field)) for name, field in KINDS.items()}
        found |= {Door(name, node.node_manager_address, port) for name, port in ports.items() if port > 0}
    told = {door.port for door in found}
    found |= {Door(each.process, each.reachable, each.port) for each in here if each.port not in told}
    return sorted(found)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _closed(answers: Mapping[Door, Answer]) -> Iterator[Finding]:
    """Yield a line for each kind of port that Ray tells, one for all else, and one for what only counts."""
    told = ["GCS", "dashboard and jobs", *(name for name in KINDS if name != "metrics")]
    for name in told:
        if mine := {door: answer for door, answer in answers.items() if door.name == name}:
            yield _judged(name, mine)
    others = {door: answer for door, answer in answers.items() if door.name not in told}
    if asking := {door: answer for door, answer in others.items() if answer in ("refused", "open")}:
        yield _judged("workers and others", asking)
    if numbers := [door for door, answer in others.items() if answer == "metrics"]:
        yield "metrics", "warn", f"{_places(numbers)} {_NUMBERS}"
    if foreign := [door for door, answer in others.items() if answer == "foreign"]:
        yield "other ports", "warn", f"{_places(foreign)} speak no protocol of Ray's or ours; the network closes them"


def _judged(name: str, answers: Mapping[Door, Answer]) -> Finding:
    if opened := [door for door, answer in answers.items() if answer in ("open", "metrics")]:
        return name, "fail", f"{_places(opened)}: a request without a token is answered; {_REMEDY}"
    if strange := [door for door, answer in answers.items() if answer == "foreign"]:
        return name, "warn", f"{_places(strange)}: it cannot be told whether a token is asked for"
    refused = sum(answer == "refused" for answer in answers.values())
    if refused < len(answers):
        return name, "ok", f"{refused} refuse who has no token; {len(answers) - refused} cannot be reached from here"
    return name, "ok", f"{refused} of {refused} refuse who has no token"


def _places(doors: Iterable[Door]) -> str:
    places = [f"{door.name} {door.host}:{door.port}" for door in doors]
    return ", ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")


def _addresses(known: Cluster, here: Iterable[Listener]) -> Finding:
    """Return what can be reached from beyond its machine: the dashboard, and Ray's own ports on all addresses."""
    name = "addresses"
    if known.dashboard and not _is_loopback(known.dashboard):
        text = f"the dashboard listens on {known.dashboard}: start Ray with --dashboard-host=127.0.0.1 and use a tunnel"
        return name, "warn", f"{text}; on Kubernetes the NetworkPolicy closes it"
    if wide := [each for each in here if each.everywhere]:
        processes = sorted({each.process for each in wide})
        text = f"{len(wide)} ports on all addresses of this machine ({', '.join(processes[:5])}), as Ray binds them"
        return name, "warn", f"{text}: let a security group or firewall admit the cluster's machines alone"
    return name, "ok", "nothing here listens on all addresses; the dashboard is on loopback or there is none"


def _is_loopback(address: str) -> bool:
    return _split(address)[0] in ("127.0.0.1", "::1", "localhost")


# --- what lies around


def _version(known: Cluster) -> Finding:
    theirs = str(known.metadata.get("ray_version", "unknown"))
    if theirs != ray.__version__:
        return "ray", "warn", f"the cluster runs {theirs} and this is {ray.__version__}: they must be the same"
    return "ray", "ok", f"{theirs} on {len(known.nodes)} nodes"


def _token_file() -> Finding:
    """Return who may read the token on this machine."""
    name = "token file"
    if os.environ.get("RAY_AUTH_TOKEN"):
        text = "RAY_AUTH_TOKEN holds it: every process of this user and its children see that; use RAY_AUTH_TOKEN_PATH"
        return name, "warn", text
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        return name, "fail", f"{path}: {error.strerror}; make one: ray get-auth-token --generate"
    if mode & 0o077:
        return name, "fail", f"{path} is readable by others (mode {mode:04o}): chmod 600 {path}"
    return name, "ok", f"{path} is readable by its owner alone"


def _secrets(jobs: Iterable[JobDetails]) -> Finding:
    """Return what looks like a secret in the jobs, which anybody with the token and many logs can read."""
    name, count, found = "secrets in jobs", 0, []
    for job in jobs:
        count += 1
        shown = {"entrypoint": job.entrypoint, "runtime_env": job.runtime_env or {}, "metadata": job.metadata or {}}
        found += [f"{job.submission_id or job.job_id} {'.'.join(map(str, keys))}" for keys, _ in secrets_in(shown)]
    if found:
        text = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        return name, "fail", f"{text}: logs and the jobs API show them; change these secrets, give them by file or role"
    return name, "ok", f"none in the entrypoints, environments and metadata of {count} jobs"


def _tls(known: Cluster) -> Finding:
    if speaks_tls(*_split(known.address)):
        return "TLS", "ok", "Ray's gRPC is encrypted, and asks for a certificate"
    if len({node.node_manager_address for node in known.nodes}) < 2:
        return "TLS", "ok", "off, and all nodes are on one machine"
    return "TLS", "warn", "off: tokens and data cross the network as they are; see elastrain cluster certificates"
