"""A watcher for virtual machines: turns a cloud's notice that it will take this machine into a drain of its Ray node.

Run one beside each node of a spot pool: `python -m elastrain.cluster.preemption aws|gcp|azure --address HEAD:6379`.
Ray itself watches no such notice (on Kubernetes, SIGTERM to `ray start --block` does the same). A drained node's cell
leaves its run at the next step boundary, so no step is lost. Where notices stand, and how much time they leave:

- AWS: `spot/instance-action` of the instance metadata service, version 2; 404 until there is one; two minutes.
- GCP: `instance/preempted`, TRUE once it is; 30 seconds.
- Azure: scheduled events of type Preempt or Terminate that name this machine; 30 seconds at least.
"""

import argparse
import contextlib
import json
import math
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from elastrain.errors import ElastrainError, ResourceError, SpecError

POLL_S = 2.0  # notices come with 30 seconds or more
REQUEST_S = 2.0
TOKEN_S = 21600
ANSWER_S = 5.0  # of Ray
PAUSE_S = 1.0  # before a drain that failed is tried again
NOTICE_S = 30.0  # where the cloud does not say until when
LINK_LOCAL = "http://169.254.169.254"


@dataclass(frozen=True, slots=True)
class Notice:
    """This machine will be taken at `deadline` (Unix time); `reason` in the cloud's own words."""

    deadline: float
    reason: str


class Aws:
    """The instance metadata service of EC2, version 2, which wants a token of its own."""

    def __init__(self, server: str = LINK_LOCAL) -> None:
        self._server = server
        self._token, self._until = "", 0.0

    def notice(self) -> Notice | None:
        """Return the notice of a spot interruption, or None; raises OSError, ValueError."""
        if time.monotonic() > self._until:
            wanted = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_S)}
            self._token = _asked(f"{self._server}/latest/api/token", wanted, method="PUT") or ""
            self._until = time.monotonic() + TOKEN_S / 2
        shown = {"X-aws-ec2-metadata-token": self._token}
        try:
            text = _asked(f"{self._server}/latest/meta-data/spot/instance-action", shown)
        except urllib.error.HTTPError:
            self._until = 0.0  # the token may be good no more
            raise
        if text is None:
            return None
        found = json.loads(text)
        moment = datetime.fromisoformat(found["time"])
        return Notice(moment.timestamp(), f"AWS will {found['action']} this instance")


class Gcp:
    """The metadata server of Compute Engine."""

    def __init__(self, server: str = "http://metadata.google.internal") -> None:
        self._server = server

    def notice(self) -> Notice | None:
        """Return the notice of a pre-emption, or None; raises OSError, ValueError."""
        text = _asked(f"{self._server}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
        if text is None or text.strip() != "TRUE":
            return None
        return Notice(time.time() + NOTICE_S, "GCP pre-empts this instance")


class Azure:
    """The scheduled events of Azure's instance metadata service; a scale set's machines see each other's."""

    KINDS = ("Preempt", "Terminate")

    def __init__(self, server: str = LINK_LOCAL) -> None:
        self._server = server
        self._name = ""

    def notice(self) -> Notice | None:
        """Return the notice of an eviction of this machine, or None; raises OSError, ValueError."""
        self._name = self._name or self._get("instance/compute/name?api-version=2021-02-01&format=text") or ""
        found = json.loads(self._get("scheduledevents?api-version=2020-07-01") or "{}")
        for event in found.get("Events", []):
            if event["EventType"] in self.KINDS and self._name in event["Resources"]:
                moment = parsedate_to_datetime(event["NotBefore"]) if event.get("NotBefore") else None
                deadline = moment.replace(tzinfo=moment.tzinfo or UTC).timestamp() if moment else 0.0
                return Notice(deadline or time.time() + NOTICE_S, f"Azure: {event['EventType']} of {self._name}")
        return None

    def _get(self, path: str) -> str | None:
        return _asked(f"{self._server}/metadata/{path}", {"Metadata": "true"})


CLOUDS: Mapping[str, Callable[..., Aws | Gcp | Azure]] = {"aws": Aws, "gcp": Gcp, "azure": Azure}


def watch(cloud: Aws | Gcp | Azure, say: Callable[[str], None], *, poll_s: float = POLL_S) -> Notice:
    """Wait for a notice and return it; a metadata server that does not answer is told of once and asked again."""
    told = False
    while True:
        try:
            if (notice := cloud.notice()) is not None:
                return notice
            told = False
        except (OSError, ValueError, KeyError, TypeError) as error:
            if not told:
                say(f"the metadata server does not answer as it should ({error}); asking again every {poll_s:g} s")
            told = True
        time.sleep(poll_s)


def node_here(address: str) -> str:
    """Return the id of this machine's node in the Ray at `address`, in hex; raises ResourceError where none is told.

    It is the one of the instance that `ray up` names to the commands that it runs, else of this machine's address.
    """
    from ray.util import get_node_ip_address  # noqa: PLC0415

    instance = os.environ.get("RAY_CLOUD_INSTANCE_ID")
    with _asking(address) as client:
        infos = client.get_all_node_info(timeout=ANSWER_S)
        alive = {node.hex(): info for node, info in infos.items() if info.state == info.ALIVE}
        here = get_node_ip_address()
    found = [node for node, info in alive.items() if instance and info.instance_id == instance]
    found = found or [node for node, info in alive.items() if info.node_manager_address == here]
    if len(found) != 1:
        raise ResourceError(f"the Ray at {address} has {len(found)} nodes on this machine ({here}); name one: --node")
    return str(found[0])


def drain(notice: Notice, *, address: str, node: str) -> None:
    """Tell the Ray cluster at `address` that a node, by its id in hex, will be gone at the notice's deadline.

    Raises ResourceError if no Ray answers or Ray does not take it. Stands on `GcsClient.drain_node`, as `ray
    drain-node` does.
    """
    from ray.core.generated import autoscaler_pb2  # noqa: PLC0415

    messages: Any = autoscaler_pb2  # made at import by protobuf
    preempted = messages.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    with _asking(address) as client:
        taken, why = client.drain_node(node, preempted, notice.reason, math.floor(notice.deadline * 1000))
    if not taken:
        raise ResourceError(f"the Ray at {address} does not drain node {node}: {why}")


def drain_in_time(
    notice: Notice, say: Callable[[str], None], *, address: str, node: str | None, pause_s: float = PAUSE_S
) -> str:
    """Drain a node, the one on this machine where it is None, and return its id; what fails is tried again.

    Raises ResourceError once the notice's deadline has passed.
    """
    told = False
    while True:
        try:
            node = node or node_here(address)
            drain(notice, address=address, node=node)
        except ResourceError as error:
            if time.time() + pause_s > notice.deadline:
                raise
            if not told:
                say(f"{error}; trying again until this machine is taken")
            told = True
            time.sleep(pause_s)
        else:
            return node


@contextlib.contextmanager
def _asking(address: str) -> Iterator[Any]:
    """Yield a client of the Ray at `address`; raises ResourceError for whatever goes wrong with it."""
    from ray._private.authentication import authentication_token_setup as token  # noqa: PLC0415
    from ray._raylet import GcsClient  # type: ignore[attr-defined] # noqa: PLC0415 -- compiled

    token.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    host, _, port = address.rpartition(":")
    try:
        # Where nothing listens, Ray's client would try for 40 seconds.
        socket.create_connection((host, int(port)), timeout=REQUEST_S).close()
        yield GcsClient(address=address)
    except Exception as error:  # Ray raises bare ones
        raise ResourceError(f"the Ray at {address} does not answer as it should: {error}") from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Watch until there is a notice, drain, and end."""
    parser = argparse.ArgumentParser(prog="python -m elastrain.cluster.preemption", description=__doc__.split("\n")[0])
    parser.add_argument("cloud", choices=sorted(CLOUDS))
    parser.add_argument("--address", required=True, help="HOST:PORT of the Ray head")
    parser.add_argument("--node", help="the Ray node's id; the one on this machine if unset")
    parser.add_argument("--metadata", help="another metadata server than the cloud's own")
    parser.add_argument("--poll-s", type=float, default=POLL_S, help="seconds between two looks")
    asked = parser.parse_args(arguments)
    cloud = CLOUDS[asked.cloud](asked.metadata) if asked.metadata else CLOUDS[asked.cloud]()

    def say(text: str) -> None:
        sys.stderr.write(f"elastrain: {text}\n")

    if not 0 < asked.poll_s < NOTICE_S:
        raise SpecError(f"--poll-s {asked.poll_s:g}: a notice may leave 30 seconds; give less")
    node = asked.node
    try:  # now, while all is well
        node = node or node_here(asked.address)
    except ResourceError as error:
        say(f"{error}; asking again at a notice")
    notice = watch(cloud, say, poll_s=asked.poll_s)
    node = drain_in_time(notice, say, address=asked.address, node=node)
    say(f"{notice.reason}: draining node {node[:12]}, {max(0.0, notice.deadline - time.time()):.0f} s left")


def _asked(url: str, headers: Mapping[str, str], *, method: str = "GET") -> str | None:
    """Return what the server answers; None where there is nothing (404). No proxy stands before a metadata server."""
    request = urllib.request.Request(url, headers=dict(headers), method=method)  # noqa: S310 -- http only
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=REQUEST_S) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


if __name__ == "__main__":
    try:
        main()
    except ElastrainError as error:
        sys.stderr.write(f"elastrain: error: {error}\n")
        sys.exit(error.exit_code)
