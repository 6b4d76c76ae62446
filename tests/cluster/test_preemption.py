"""Notices of three clouds, from a metadata server on loopback that answers as theirs do, headers required included."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest

from elastrain.cluster import preemption
from elastrain.cluster.preemption import Aws, Azure, Gcp, Notice, drain_in_time, watch
from elastrain.errors import ResourceError

Answers = dict[tuple[str, str], Callable[[Any], tuple[int, str]]]
TOKEN = "a-token"  # noqa: S105 -- of a server that is ours
SOON = "2031-05-06T07:08:09Z"
SOON_UNIX = 1935817689.0


@contextmanager
def metadata(answers: Answers) -> Iterator[str]:
    """Serve what `answers` gives for (method, path): called with the request's headers, it returns status and text."""

    class Handler(BaseHTTPRequestHandler):
        def do(self) -> None:
            given = answers.get((self.command, self.path))
            status, text = given(self.headers) if given else (404, "none")
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_PUT = do  # noqa: N815 -- their names there

        def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 -- its name there
            del format, arguments

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def needs(header: str, value: str, text: str) -> Callable[[Any], tuple[int, str]]:
    return lambda headers: (200, text) if headers.get(header) == value else (401, "")


def aws(action: str | None) -> Answers:
    answers: Answers = {
        ("PUT", "/latest/api/token"): lambda headers: (
            (200, TOKEN) if headers.get("X-aws-ec2-metadata-token-ttl-seconds") else (400, "")
        )
    }
    if action is not None:
        found = needs("X-aws-ec2-metadata-token", TOKEN, json.dumps({"action": action, "time": SOON}))
        answers["GET", "/latest/meta-data/spot/instance-action"] = found
    return answers


def gcp(text: str) -> Answers:
    return {("GET", "/computeMetadata/v1/instance/preempted"): needs("Metadata-Flavor", "Google", text)}


def azure(*events: dict[str, Any]) -> Answers:
    return {
        ("GET", "/metadata/instance/compute/name?api-version=2021-02-01&format=text"): needs(
            "Metadata", "true", "vm_7"
        ),
        ("GET", "/metadata/scheduledevents?api-version=2020-07-01"): needs(
            "Metadata", "true", json.dumps({"DocumentIncarnation": 1, "Events": list(events)})
        ),
    }


def event(kind: str, *machines: str, before: str = "Tue, 06 May 2031 07:08:09 GMT") -> dict[str, Any]:
    return {"EventType": kind, "Resources": list(machines), "EventStatus": "Scheduled", "NotBefore": before}


def test_aws_tells_action_and_moment_to_who_has_a_token() -> None:
    with metadata(aws(None)) as server:
        assert Aws(server).notice() is None
    with metadata(aws("terminate")) as server:
        notice = Aws(server).notice()
    assert notice is not None
    assert (notice.deadline, notice.reason) == (SOON_UNIX, "AWS will terminate this instance")


def test_aws_token_that_is_good_no_more_is_replaced() -> None:
    with metadata(aws("stop")) as server:
        cloud = Aws(server)
        cloud._token, cloud._until = "an old one", time.monotonic() + 1000
        notice = watch(cloud, lambda _: None, poll_s=0.01)
    assert notice.reason == "AWS will stop this instance"


def test_gcp_says_true_and_the_time_left_is_what_gcp_promises() -> None:
    with metadata(gcp("FALSE")) as server:
        assert Gcp(server).notice() is None
    with metadata(gcp("TRUE")) as server:
        before = time.time()
        notice = Gcp(server).notice()
    assert notice is not None
    assert before + 30 <= notice.deadline <= time.time() + 30


@pytest.mark.parametrize("kind", ["Preempt", "Terminate"])
def test_azure_names_the_machine_that_goes(kind: str) -> None:
    with metadata(azure(event("Reboot", "vm_7"), event(kind, "vm_6"), event(kind, "vm_6", "vm_7"))) as server:
        notice = Azure(server).notice()
    assert notice is not None
    assert (notice.deadline, notice.reason) == (SOON_UNIX, f"Azure: {kind} of vm_7")


def test_azure_events_of_others_and_of_other_kinds_are_none_of_ours() -> None:
    with metadata(azure(event("Freeze", "vm_7"), event("Preempt", "vm_70", "vm_6"))) as server:
        assert Azure(server).notice() is None


def test_azure_event_that_has_begun_has_no_moment_and_is_a_notice_still() -> None:
    with metadata(azure(event("Preempt", "vm_7", before=""))) as server:
        notice = Azure(server).notice()
    assert notice is not None
    assert notice.deadline > time.time()


def test_a_server_that_fails_is_told_of_once_and_asked_again() -> None:
    answers = gcp("FALSE")
    ways = iter([(500, ""), (500, ""), (200, "FALSE"), (200, "TRUE")])
    answers["GET", "/computeMetadata/v1/instance/preempted"] = lambda _: next(ways)
    said: list[str] = []
    with metadata(answers) as server:
        assert watch(Gcp(server), said.append, poll_s=0.01).reason == "GCP pre-empts this instance"
    assert len(said) == 1
    assert "asking again every" in said[0]


@pytest.mark.parametrize("node", ["abcd", None])
def test_a_drain_that_fails_is_tried_again_until_the_deadline(
    node: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address answers on the second try only: it is a port at which nothing listens before."""
    done: list[str] = []
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{door.getsockname()[1]}"

        def drain_node(node: str, *_: Any) -> tuple[bool, str]:
            done.append(node)
            return len(done) > 1, "busy"

        @contextmanager
        def client(address: str) -> Iterator[Any]:
            with _asking(address):
                alive = SimpleNamespace(state=0, ALIVE=0, instance_id="i-1", node_manager_address="10.0.0.9")
                yield SimpleNamespace(
                    get_all_node_info=lambda timeout: {b"\xab\xcd": alive},  # noqa: ARG005
                    drain_node=drain_node,
                )

        _asking = preemption._asking
        monkeypatch.setattr(preemption, "_asking", client)
        monkeypatch.setattr("ray._raylet.GcsClient", lambda address: address)
        monkeypatch.setenv("RAY_CLOUD_INSTANCE_ID", "i-1")
        said: list[str] = []

        def say(text: str) -> None:
            said.append(text)
            door.listen()

        drained = drain_in_time(Notice(time.time() + 30, "x"), say, address=address, node=node, pause_s=0.01)
    assert drained == "abcd"
    assert done == ["abcd", "abcd"], "what Ray does not take at first is asked for again, too"
    assert len(said) == 1
    assert "trying again until this machine is taken" in said[0]


def test_after_the_deadline_nothing_is_tried() -> None:
    with pytest.raises(ResourceError, match=r"127\.0\.0\.1:1 does not answer"):
        drain_in_time(Notice(time.time(), "x"), lambda _: None, address="127.0.0.1:1", node="abc")
