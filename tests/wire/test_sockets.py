"""Sockets let in whom they should, and live on whatever comes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import socket as tcp
import subprocess
import sys
from collections.abc import Iterator

import pytest
import zmq
import zmq.asyncio

from tandem.errors import ConfigError
from tandem.wire.keys import ClusterKey, new_key
from tandem.wire.sockets import SocketOptions, Sockets
from tests.support.deployment import clean_environment

MILLISECONDS = 20_000
HOST = "127.0.0.1"
TURNED_AWAY = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)

Context = zmq.Context[zmq.Socket[bytes]]
Socket = zmq.Socket[bytes]


@pytest.fixture
def context() -> Iterator[Context]:
    made: Context = zmq.Context()
    yield made
    made.destroy(linger=0)


@pytest.fixture
def key() -> ClusterKey:
    return new_key()


def listen(context: Context, key: ClusterKey | None, **options: int) -> tuple[Socket, int]:
    """A listener that notes whom it turned away."""
    chosen = SocketOptions(monitor=TURNED_AWAY, **options)  # type: ignore[arg-type]
    return Sockets(context, key).bind(zmq.ROUTER, HOST, 0, chosen)


def receive(socket: Socket) -> list[bytes]:
    assert socket.poll(MILLISECONDS), "nothing arrived"
    return socket.recv_multipart()


def require_round_trip(listener: Socket, sockets: Sockets[Socket], port: int) -> None:
    """A member gets through, and nobody else got through before."""
    member = sockets.connect(zmq.DEALER, HOST, port)
    member.send(b"from a member")
    sender, text = receive(listener)
    assert text == b"from a member"
    listener.send_multipart([sender, b"welcome"])
    assert receive(member) == [b"welcome"]
    assert not listener.poll(0)


def require_turned_away(listener: Socket, intruder: Socket) -> None:
    intruder.send(b"from an intruder")
    assert listener.get_monitor_socket().poll(MILLISECONDS), "the intruder was not turned away"
    intruder.close(linger=0)


@pytest.mark.parametrize("keyed", [True, False])
def test_members_talk(context: Context, key: ClusterKey, keyed: bool) -> None:
    ours = key if keyed else None
    listener, port = listen(context, ours)
    require_round_trip(listener, Sockets(context, ours), port)


def test_a_client_without_a_key_gets_nothing_through(context: Context, key: ClusterKey) -> None:
    listener, port = listen(context, key)
    require_turned_away(listener, Sockets(context, None).connect(zmq.DEALER, HOST, port))
    require_round_trip(listener, Sockets(context, key), port)


def test_a_client_with_another_key_gets_nothing_through(context: Context, key: ClusterKey) -> None:
    listener, port = listen(context, key)
    require_turned_away(listener, Sockets(context, new_key()).connect(zmq.DEALER, HOST, port))
    require_round_trip(listener, Sockets(context, key), port)


def test_knowing_the_servers_public_key_is_not_enough(context: Context, key: ClusterKey) -> None:
    listener, port = listen(context, key)
    intruder = context.socket(zmq.DEALER)
    intruder.curve_serverkey = key.server.public
    intruder.curve_publickey, intruder.curve_secretkey = zmq.curve_keypair()
    intruder.connect(f"tcp://{HOST}:{port}")
    require_turned_away(listener, intruder)
    require_round_trip(listener, Sockets(context, key), port)


def test_a_client_with_a_key_sends_nothing_to_a_listener_without_one(context: Context, key: ClusterKey) -> None:
    listener, port = listen(context, None)
    require_turned_away(listener, Sockets(context, key).connect(zmq.DEALER, HOST, port))
    require_round_trip(listener, Sockets(context, None), port)


def test_listeners_of_two_clusters_share_a_context_and_not_their_clients(context: Context) -> None:
    keys = new_key(), new_key()
    listeners = [listen(context, key) for key in keys]
    require_turned_away(listeners[1][0], Sockets(context, keys[0]).connect(zmq.DEALER, HOST, listeners[1][1]))
    for key, (listener, port) in zip(keys, listeners, strict=True):
        require_round_trip(listener, Sockets(context, key), port)


GARBAGE = [b"\0" * 64, b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 4096, random.Random(0).randbytes(100_000)]


@pytest.mark.parametrize("garbage", GARBAGE, ids=["zeros", "http", "ones", "random"])
def test_garbage_does_not_get_through_to_a_listener(context: Context, key: ClusterKey, garbage: bytes) -> None:
    listener, port = listen(context, key)
    with tcp.create_connection((HOST, port)) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(garbage)
        require_round_trip(listener, Sockets(context, key), port)


@pytest.mark.parametrize("garbage", GARBAGE, ids=["zeros", "http", "ones", "random"])
def test_a_listener_without_a_key_outlives_garbage(context: Context, garbage: bytes) -> None:
    listener, port = listen(context, None)
    with tcp.create_connection((HOST, port)) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(garbage)
        member = Sockets(context, None).connect(zmq.DEALER, HOST, port)
        member.send(b"from a member")
        # Without a key anything that has the form of a frame of ZMTP 1.0 is a message.
        while receive(listener)[1:] != [b"from a member"]:
            pass


@pytest.mark.parametrize("keyed", [True, False])
def test_a_message_that_is_too_long_is_dropped_with_its_connection(
    context: Context, key: ClusterKey, keyed: bool
) -> None:
    ours = key if keyed else None
    listener, port = listen(context, ours, max_message=1000)
    chatty = Sockets(context, ours).connect(zmq.DEALER, HOST, port, SocketOptions(reconnect=False))
    chatty.send(b"x" * 1000)
    assert len(receive(listener)[1]) == 1000
    monitor = chatty.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    chatty.send(b"x" * 100_000)
    assert monitor.poll(MILLISECONDS), "the connection was not dropped"
    require_round_trip(listener, Sockets(context, ours), port)


@pytest.mark.parametrize("host", ["0.0.0.0", "*", "", "::", "192.0.2.1"])
def test_without_a_key_nothing_but_loopback_is_open(context: Context, host: str) -> None:
    sockets = Sockets(context, None)
    with pytest.raises(ConfigError, match=r"listen on .*tandem keygen FILE.*--cluster-key-file"):
        sockets.bind(zmq.ROUTER, host, 0)
    with pytest.raises(ConfigError, match=r"connect to .*tandem keygen FILE.*--cluster-key-file"):
        sockets.connect(zmq.DEALER, host, 1234)


def test_with_a_key_every_address_is_open(context: Context, key: ClusterKey) -> None:
    listener, port = Sockets(context, key).bind(zmq.ROUTER, "0.0.0.0", 0)
    require_round_trip(listener, Sockets(context, key), port)


def test_a_port_in_use_is_named(context: Context) -> None:
    _, port = listen(context, None)
    with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port}.*in use"):
        Sockets(context, None).bind(zmq.ROUTER, HOST, port)


def test_an_address_of_another_machine_and_an_unknown_name_are_named(context: Context, key: ClusterKey) -> None:
    sockets = Sockets(context, key)
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1 is not an address of this machine"):
        sockets.bind(zmq.ROUTER, "192.0.2.1", 0)
    with pytest.raises(ConfigError, match=r"no-such-host\.invalid"):
        sockets.connect(zmq.DEALER, "no-such-host.invalid", 1234)


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_port_that_cannot_be_connected_to_is_refused(context: Context, port: int) -> None:
    with pytest.raises(ConfigError, match="1 to 65535"):
        Sockets(context, None).connect(zmq.DEALER, HOST, port)


def test_a_name_works_where_an_address_does(context: Context, key: ClusterKey) -> None:
    listener, port = Sockets(context, key).bind(zmq.ROUTER, "localhost", 0)
    for ours in ("localhost", HOST):
        member = Sockets(context, key).connect(zmq.DEALER, ours, port)
        member.send(b"hello")
        assert receive(listener)[1] == b"hello"


def test_a_mandatory_router_says_that_a_peer_is_not_there(context: Context) -> None:
    listener, _ = listen(context, None, mandatory=True)
    with pytest.raises(zmq.ZMQError) as caught:
        listener.send_multipart([b"nobody", b"hello"])
    assert caught.value.errno == errno.EHOSTUNREACH


def test_with_handover_the_newest_of_one_identity_is_the_one_that_is_served(context: Context) -> None:
    listener, port = listen(context, None, handover=True)
    sockets = Sockets(context, None)
    for text in (b"first", b"second"):
        client = sockets.connect(zmq.DEALER, HOST, port, SocketOptions(identity=b"worker"))
        client.send(text)
        assert receive(listener) == [b"worker", text]
    listener.send_multipart([b"worker", b"answer"])
    assert receive(client) == [b"answer"]


def test_asyncio_contexts_work_the_same(context: Context, key: ClusterKey) -> None:
    async def talk() -> list[bytes]:
        ours = zmq.asyncio.Context()
        try:
            sockets = Sockets(ours, key)
            listener, port = sockets.bind(zmq.ROUTER, HOST, 0)
            client = sockets.connect(zmq.DEALER, HOST, port)
            await client.send(b"hello")
            sender, text = await asyncio.wait_for(listener.recv_multipart(), MILLISECONDS / 1000)
            await listener.send_multipart([sender, text + b" yourself"])
            return await asyncio.wait_for(client.recv_multipart(), MILLISECONDS / 1000)
        finally:
            ours.destroy(linger=0)

    assert asyncio.run(talk()) == [b"hello yourself"]


def test_a_context_with_a_key_ends_at_once(key: ClusterKey) -> None:
    context: Context = zmq.Context()
    listener, port = listen(context, key)
    require_round_trip(listener, Sockets(context, key), port)
    context.destroy(linger=0)
    assert context.closed


HANGS_UP = """
import time, zmq
from tandem.wire import sockets
made = sockets.Sockets(zmq.Context(), None)
listener, port = made.bind(zmq.ROUTER, "127.0.0.1", 0, sockets.SocketOptions(hwm=4, handover={same_name}))
def stranger():
    return made.connect(zmq.DEALER, "127.0.0.1", port, sockets.SocketOptions(hwm=0, identity=b"name"))
first = stranger()
first.send(b"x")
heard = listener.recv_multipart()
if {same_name}:
    second = stranger()
    second.send(b"y")
    heard = listener.recv_multipart()
for _ in range(100):
    first.send(b"x")
time.sleep(0.3)
first.close(linger=0)
time.sleep(2.0)
print(heard)
"""


@pytest.mark.parametrize("patient", [False, True])
def test_no_socket_sends_heartbeats_by_which_a_peer_could_end_the_process(context: Context, patient: bool) -> None:
    options = SocketOptions(patient=patient)
    listener, port = Sockets(context, None).bind(zmq.ROUTER, HOST, 0, options)
    dialler = Sockets(context, None).connect(zmq.DEALER, HOST, port, options)
    for socket in (listener, dialler):
        assert socket.get(zmq.HEARTBEAT_IVL) == 0
        assert socket.get(zmq.TCP_KEEPALIVE) == 1
        assert socket.get(zmq.TCP_MAXRT) == (10_000 if patient else 6_000)


@pytest.mark.parametrize("same_name", [False, True])
def test_a_peer_that_hangs_up_with_messages_that_cannot_be_taken_does_not_end_the_listener(same_name: bool) -> None:
    """libzmq ends the process when a heartbeat is due on such a connection; that none is sent is no event."""
    command = [sys.executable, "-c", HANGS_UP.format(same_name=same_name)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=clean_environment())
    assert (ended.returncode, ended.stdout[:9]) == (0, "[b'name',"), ended.stderr
