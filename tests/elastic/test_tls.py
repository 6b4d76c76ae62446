"""TLS between the processes of a run, where Ray's gRPC has it: the same results, no stranger, nothing to be read."""

import contextlib
import os
import select
import socket
import ssl
import threading
from collections.abc import Callable
from functools import partial
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.elastic import test_door, test_membership, test_nccl, test_seat
from tests.elastic.test_door import CPU, TOKEN, Party, at_once, turned, until
from tests.elastic.test_membership import Serve

from elastrain.cluster.certificates import make_certificates
from elastrain.cluster.doors import knock, speaks_tls
from elastrain.elastic.greeting import admit, call, listen
from elastrain.elastic.mesh import CHUNK, SMALL, Mesh
from elastrain.elastic.tls import VARIABLES, Credentials, TlsSocket, _read, credentials
from elastrain.errors import ResourceError
from elastrain.training.reduce import GroupLost

PATTERN = b"known to whoever listens; "


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The variables of two nodes of one authority, and of a node of another."""
    folder = tmp_path_factory.mktemp("tls")
    places = {"ours": ("one", "ours"), "second": ("one", "second"), "other": ("two", "other")}
    return {
        name: make_certificates(str(folder / home), out=str(folder / out))["environment"]
        for name, (home, out) in places.items()
    }


Use = Callable[[str], None]


@pytest.fixture
def use(made: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> Use:
    """Give this process the variables of a node, or `plain`."""

    def set_variables(name: str) -> None:
        for variable, value in made.get(name, {"RAY_USE_TLS": "0"}).items():
            monkeypatch.setenv(variable, value)

    return set_variables


@pytest.fixture
def tls(use: Use) -> None:
    """TLS is on."""
    use("ours")


@pytest.fixture
def stranger(use: Use) -> Callable[[str], Credentials]:
    """Return what another node has, while this process has its own."""

    def other(name: str) -> Credentials:
        use(name)
        held = credentials()
        use("ours")
        _read.cache_clear()  # it may be changed
        assert held is not None
        return held

    return other


# --- members


def results(groups: list[Mesh], length: int) -> list[torch.Tensor]:
    """What all members have after a sum, a broadcast, a gathering and an exchange of `length` random elements."""
    size, chance = len(groups), torch.Generator().manual_seed(length)
    values = [torch.randn(length, generator=chance) for _ in groups]
    sums, given = ([value.clone() for value in values] for _ in range(2))
    gathered = [torch.empty(size * length) for _ in groups]
    lengths = [len(part) for part in values[0].tensor_split(size)]
    outputs = [torch.empty(size * lengths[rank]) for rank in range(size)]
    for works in (
        [partial(group.all_reduce, sums[group.rank]) for group in groups],
        [partial(group.broadcast, given[group.rank], 1) for group in groups],
        [partial(group.all_gather, gathered[group.rank], values[group.rank]) for group in groups],
        [partial(g.all_to_all, outputs[g.rank], values[g.rank], [lengths[g.rank]] * size, lengths) for g in groups],
    ):
        assert at_once(works) == [None] * size
    assert all(torch.equal(outputs[rank], torch.cat(parts)) for rank, parts in enumerate(turned(values, size)))
    return [*sums, *given, *gathered, *outputs]


@pytest.mark.parametrize("size", [2, 3])
def test_members_come_to_the_same_bits_as_over_plain_connections(size: int, use: Use) -> None:
    found = {}
    for name in ("plain", "ours"):
        use(name)
        groups = Party(size).join(1)
        for group in groups:
            for sock in group._peers.values():
                assert isinstance(sock, TlsSocket) == (name == "ours")
                assert not isinstance(sock, TlsSocket) or sock.version() == "TLSv1.3"
        found[name] = [results(groups, length) for length in (0, 1, 5, SMALL // 4 + 1, 2 * CHUNK // 4 + 3)]
        for group in groups:
            group.abandon()
    for plain, encrypted in zip(found["plain"], found["ours"], strict=True):
        assert all(torch.equal(one, other) for one, other in zip(plain, encrypted, strict=True))


@pytest.mark.usefixtures("tls")
def test_who_leaves_in_the_middle_wakes_the_others() -> None:
    groups = Party(3).join(1)

    def leave() -> None:
        until(lambda: all(group.waits is not None for group in groups[:2]))
        groups[2].abandon()

    waits = [partial(group.all_reduce, torch.ones(4 * CHUNK)) for group in groups[:2]]
    woken = at_once([*waits, leave])
    assert all(isinstance(each, GroupLost) for each in woken[:2])


@pytest.mark.usefixtures("tls")
@pytest.mark.parametrize(
    "scenario",
    [
        *[
            partial(test_door.test_who_waits_in_an_operation_is_woken_from_another_thread, name, how)
            for name in ("all_reduce", "broadcast")
            for how in ("abandoned", "lost")
        ],
        test_door.test_connecting_is_interrupted,
        test_door.test_nothing_of_an_abandoned_group_stays,
        test_door.test_members_that_are_not_in_step_are_found_out,
        test_door.test_who_comes_too_late_or_twice_is_dropped,
        test_nccl.test_torch_meets_in_a_store_that_asks_for_the_token,
        test_nccl.test_who_waits_for_a_value_of_a_generation_that_is_over_is_sent_away,
    ],
    ids=lambda scenario: getattr(scenario, "func", scenario).__name__ + str(getattr(scenario, "args", "")),
)
def test_what_holds_of_doors_holds_of_encrypted_ones(scenario: Callable[[], None]) -> None:
    scenario()


# --- seats and the membership

opened, start, serve_seats, serve = test_seat.opened, test_seat.start, test_seat.serve, test_membership.serve


@pytest.mark.usefixtures("tls")
@pytest.mark.parametrize(
    "scenario",
    [
        test_seat.test_who_survives_keeps_its_state_and_goes_on,
        test_seat.test_the_end_of_the_membership_ends_every_wait,
        test_seat.test_a_step_waits_while_the_membership_does_not_answer,
    ],
)
def test_what_holds_of_seats_holds_of_encrypted_ones(
    scenario: Callable[..., None], serve_seats: Any, start: Any
) -> None:
    scenario(serve_seats, start)


@pytest.mark.usefixtures("tls")
@pytest.mark.parametrize(
    "scenario",
    [
        test_membership.test_the_end_of_a_connection_is_a_death_of_which_the_others_hear_before_anything_else,
        test_membership.test_who_is_silent_loses_its_lease,
    ],
)
def test_what_holds_of_memberships_holds_of_encrypted_ones(scenario: Callable[[Serve], None], serve: Serve) -> None:
    scenario(serve)


def pair(send_s: float | None = None) -> tuple[Connection, Connection]:
    """Two ends of a connection: of who listens, and of who called."""
    with listen("127.0.0.1") as door:

        def come() -> Connection:
            return admit(door.accept()[0], TOKEN, send_s=send_s)

        first, second = at_once([come, lambda: call(door.getsockname(), TOKEN)])
    return first, second


@pytest.mark.usefixtures("tls")
def test_one_thread_hears_while_another_one_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """At both ends, of which both say more than fits into what the kernel keeps; OpenSSL sees one thread at a time."""
    within: list[int] = []
    overlaps: list[int] = []

    def watched(name: str) -> Callable[..., Any]:
        real = getattr(ssl.SSLSocket, name)

        def work(sock: TlsSocket, *arguments: Any) -> Any:
            overlaps.extend(each for each in within if each == id(sock))
            within.append(id(sock))
            try:
                return real(sock, *arguments)
            finally:
                within.remove(id(sock))

        return work

    for name in ("send", "recv"):
        monkeypatch.setattr(TlsSocket, name, watched(name), raising=False)
    ends = pair()
    said = [os.urandom(size) for size in (0, 1, 100, 20_000, 3_000_000, 7) * 20]

    def speak(end: Connection) -> None:
        for each in said:
            end.send(each)

    def hear(end: Connection) -> list[bytes]:
        return [end.recv() if end.poll(60) else b"nothing came" for _ in said]

    found = at_once([partial(work, end) for end in ends for work in (speak, hear)])
    assert found == [None, said, None, said]
    assert overlaps == []
    for end in ends:
        end.close()


@pytest.mark.parametrize("name", ["plain", "ours"])
def test_who_reads_nothing_is_not_waited_for(name: str, use: Use) -> None:
    use(name)
    first, second = pair(send_s=0.1)
    with first, second, pytest.raises(OSError, match=r"unavailable|reads nothing"):
        first.send(bytes(1 << 26))


# --- strangers


def bare_context() -> ssl.SSLContext:
    """Who has no certificate, and asks for none."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname, made.verify_mode, made.sslsocket_class = False, ssl.CERT_NONE, TlsSocket
    return made


def is_refused(connection: ssl.SSLSocket | socket.socket) -> bool:
    """Hear what is said before the end, without an answer."""
    connection.settimeout(60)
    with connection, contextlib.suppress(ConnectionError, ssl.SSLError):
        while connection.recv(1024):
            pass
    return True


@pytest.mark.usefixtures("tls")
def test_who_has_no_certificate_of_the_authority_or_no_token_is_refused_and_disturbs_nobody(
    stranger: Callable[[str], Credentials],
) -> None:
    party = Party(2)
    door = party.doors[0]
    with pytest.raises(AuthenticationError):
        call(door.address, b"guessed")
    plain = socket.create_connection(door.address)
    plain.sendall(PATTERN * 20)
    assert is_refused(plain)
    assert is_refused(bare_context().wrap_socket(socket.create_connection(door.address)))
    forged = stranger("other")
    forged.calls.verify_mode = ssl.CERT_NONE  # it does not care who we are
    assert is_refused(forged.secured(socket.create_connection(door.address), listens=False))
    assert speaks_tls(*door.address)
    assert knock(*door.address) == "refused"
    assert door._came == {}
    assert results(party.join(1), 5)


@pytest.mark.usefixtures("tls")
def test_who_is_refused_says_so_in_a_sentence_and_does_not_try_for_long(
    stranger: Callable[[str], Credentials], monkeypatch: pytest.MonkeyPatch
) -> None:
    party, ours, other = Party(2), stranger("ours"), stranger("other")
    mixed = Credentials(other.listens, stranger("ours").calls, other.certificate)
    mixed.calls.load_cert_chain(*(os.environ[name].replace("/ours/", "/other/") for name in VARIABLES[:2]))
    none = Credentials(other.listens, bare_context(), b"")
    made = party.generation(1)
    for held, why in ((other, "certificate"), (mixed, "ALERT"), (none, "CERTIFICATE_REQUIRED")):
        monkeypatch.setattr(
            "elastrain.elastic.greeting.credentials",
            lambda held=held: held if threading.current_thread().name in ("MainThread", "connect") else ours,
        )
        words = rf"no TLS between .* and 127.0.0.1:\d+ \(.*({why}).*\); both need RAY_USE_TLS=1 and in RAY_TLS_SERVER"
        with pytest.raises(ResourceError, match=words) as refused:
            call(party.doors[0].address, TOKEN)
        assert refused.value.exit_code == 6
        with pytest.raises(GroupLost, match=words):  # long before CONNECT_S
            party.doors[1].join(made, "w1", CPU, threading.Event())


@pytest.mark.usefixtures("tls")
def test_who_is_silent_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastrain.elastic.greeting.GREETING_S", 0.2)
    door = Party(1).doors[0]
    silent = socket.create_connection(door.address)
    until(lambda: any(thread.name == "door-guest" for thread in threading.enumerate()))
    assert is_refused(silent)
    until(lambda: all(thread.name != "door-guest" for thread in threading.enumerate()))


@pytest.mark.usefixtures("tls")
def test_another_node_of_the_cluster_cannot_stand_in_between(stranger: Callable[[str], Credentials]) -> None:
    """Though its certificate is as good as any, and it hands on what proves the token, as it comes."""
    between, door = stranger("second"), Party(1).doors[0]
    with listen("127.0.0.1") as place:

        def relay() -> None:
            first = between.secured(place.accept()[0], listens=True)
            second = between.secured(socket.create_connection(door.address), listens=False)
            with first, second:
                handed_on(first, second)

        threading.Thread(target=relay, daemon=True).start()
        with pytest.raises((AuthenticationError, EOFError, OSError)):
            call(place.getsockname(), TOKEN)
        with call(door.address, TOKEN):
            pass  # by itself it may


def handed_on(first: socket.socket, second: socket.socket, seen: bytearray | None = None) -> None:
    """Hand on what each of two sides says to the other, until one has ended."""
    poller, other = select.poll(), {first: second, second: first}
    by_number = {sock.fileno(): sock for sock in other}
    for number in by_number:
        poller.register(number, select.POLLIN)
    with contextlib.suppress(OSError):
        while True:
            for number, _ in poller.poll():
                said = by_number[number].recv(1 << 20)
                if not said:
                    return
                if seen is not None:
                    seen += said
                other[by_number[number]].sendall(said)


# --- what goes over the wire


class Wiretap:
    """A place that leads to another one; `seen` is what went through it, both ways."""

    def __init__(self, to: tuple[str, int]) -> None:
        self.seen, self._to = bytearray(), to
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            came, goes = self._listener.accept()[0], socket.create_connection(self._to)
            threading.Thread(target=self._serve, args=(came, goes), daemon=True).start()

    def _serve(self, came: socket.socket, goes: socket.socket) -> None:
        with came, goes:
            handed_on(came, goes, self.seen)


@pytest.mark.parametrize("name", ["plain", "ours"])
def test_nothing_that_is_sent_can_be_read_on_the_way(name: str, use: Use) -> None:
    """Weights between members, what a membership is told, what is put into a store; without TLS all of it can."""
    use(name)
    party = Party(2)
    taps = [Wiretap(door.address) for door in party.doors]
    for door, tap in zip(party.doors, taps, strict=True):
        door.address = tap.address
    groups = party.join(1)
    tensors = [torch.frombuffer(bytearray(PATTERN * 40_000), dtype=torch.uint8) for _ in groups]
    tensors[1].zero_()
    at_once([partial(group.broadcast, tensor, 0) for group, tensor in zip(groups, tensors, strict=True)])
    assert torch.equal(*tensors)
    assert (PATTERN in taps[0].seen) == (name == "plain")
    test_nccl.store_of(party, 1, 0).set("key", b"of NCCL: " + PATTERN)
    assert (b"of NCCL: " + PATTERN in taps[0].seen) == (name == "plain")
    if name == "ours":  # nor in the moment in which another thread ends it
        sock = groups[1]._peers[0]
        sock.shutdown(socket.SHUT_RD)
        before = len(taps[0].seen)
        sock.send(PATTERN)
        until(lambda: len(taps[0].seen) > before)
        assert PATTERN not in taps[0].seen
    membership = test_seat.served(1)
    tap = Wiretap(membership.address)
    with contextlib.closing(membership), call(tap.address, membership.token) as line:
        line.send(("enter", test_membership.worker(PATTERN.decode()), None, 0, False))
        assert line.recv()[0] == "answer"
    assert (PATTERN in tap.seen) == (name == "plain")
    assert len(tap.seen) > len(PATTERN)


# --- what is missing


@pytest.mark.usefixtures("tls")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"RAY_TLS_CA_CERT": ""}, "RAY_USE_TLS is set, and RAY_TLS_CA_CERT is not, on"),
        (
            {"RAY_TLS_SERVER_KEY": "{folder}/none.key"},
            "RAY_TLS_SERVER_KEY: .*none.key cannot be read on .*No such file",
        ),
        ({"RAY_TLS_SERVER_KEY": "{folder}/../other/node.key"}, "cannot be used together .*KEY_VALUES_MISMATCH"),
        ({"RAY_TLS_SERVER_CERT": "{folder}/node.key"}, "cannot be used together"),
        ({"RAY_TLS_CA_CERT": "{folder}/node.key"}, "cannot be used together"),
    ],
)
def test_what_is_missing_is_said_before_anybody_waits(
    changes: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(os.environ["RAY_TLS_CA_CERT"]).parent
    for name, value in changes.items():
        monkeypatch.setenv(name, value.format(folder=folder))
    for work in (lambda: listen("127.0.0.1"), lambda: call(("127.0.0.1", 1), TOKEN)):
        with pytest.raises(ResourceError, match=words + ".*elastrain cluster certificates"):
            work()
