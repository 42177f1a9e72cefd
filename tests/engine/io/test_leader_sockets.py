"""Who gets through to a leader: its own transfer thread within the process, and ranks that know the engine's key."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import zmq
import zmq.asyncio

from tandem.engine.io.leader_sockets import FollowerSockets, LeaderSockets
from tandem.wire.keys import ClusterKey, new_key
from tandem.wire.sockets import SocketOptions, Sockets

HOST = "127.0.0.1"
SECONDS = 10


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    made: zmq.Context[Any] = zmq.Context()
    yield made
    made.destroy(linger=0)


def bind(context: zmq.Context[Any], key: ClusterKey | None) -> LeaderSockets:
    return LeaderSockets.bind(HOST, context, key)


def close(leader: LeaderSockets) -> None:
    leader.step.disable_monitor()
    leader.transfer.context.destroy(linger=0)


@pytest.mark.parametrize("keyed", [True, False])
def test_ranks_reach_their_leader_with_and_without_a_cluster_key(context: zmq.Context[Any], keyed: bool) -> None:
    async def play() -> None:
        key = new_key() if keyed else None
        leader = bind(context, key)
        assert (leader.addresses.engine_key is None) == keyed
        follower = FollowerSockets(1, context, key, leader.addresses)
        step, transfer = follower.connect_step(), follower.connect_transfer_thread()
        step.send(b"step")
        assert leader.step.poll(SECONDS * 1000)
        assert leader.step.recv_multipart() == [b"1", b"step"]
        transfer.send(b"transfer")
        assert await leader.transfer.recv_multipart() == [b"1", b"transfer"]
        own = leader.connect_transfer_thread()
        own.send(b"own")
        assert await leader.transfer.recv_multipart() == [b"0", b"own"]
        await leader.transfer.send_multipart([b"0", b"to itself"])
        await leader.transfer.send_multipart([b"1", b"to the other"])
        for socket, text in ((own, b"to itself"), (transfer, b"to the other")):
            assert socket.poll(SECONDS * 1000)
            assert socket.recv() == text
        for socket in (step, transfer):
            socket.disable_monitor()
        own.close()
        close(leader)

    asyncio.run(asyncio.wait_for(play(), SECONDS))


@pytest.mark.parametrize("rank", [b"0", b"1"])
@pytest.mark.parametrize("stranger_key", [True, False])
def test_a_stranger_that_calls_itself_a_rank_replaces_none(
    context: zmq.Context[Any], rank: bytes, stranger_key: bool
) -> None:
    """On loopback without a cluster key, where every local user can connect."""

    async def play() -> None:
        leader = bind(context, None)
        follower = FollowerSockets(1, context, None, leader.addresses)
        ranks = {b"0": leader.connect_transfer_thread(), b"1": follower.connect_transfer_thread()}
        for name, socket in ranks.items():
            socket.send(name)
            assert await leader.transfer.recv_multipart() == [name, name]
        turned_away = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        monitor = leader.transfer.get_monitor_socket(turned_away | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
        sockets: Sockets[zmq.Socket[bytes]] = Sockets(context, new_key() if stranger_key else None)
        address = leader.addresses.transfer
        stranger = sockets.connect(zmq.DEALER, HOST, address.port, SocketOptions(identity=rank))
        stranger.send(b"from a stranger")
        await monitor.recv_multipart()  # turned away
        for name, socket in ranks.items():
            await leader.transfer.send_multipart([name, b"still there"])
            assert socket.poll(SECONDS * 1000)
            assert socket.recv() == b"still there"
        assert not stranger.poll(0)
        leader.transfer.disable_monitor()
        ranks[b"1"].disable_monitor()
        ranks[b"0"].close()
        close(leader)

    asyncio.run(asyncio.wait_for(play(), SECONDS))


def test_the_engines_key_is_not_shown(context: zmq.Context[Any]) -> None:
    leader = bind(context, None)
    assert leader.addresses.engine_key is not None
    assert str(leader.addresses.engine_key) not in f"{leader.addresses!r} {leader.addresses}"
    close(leader)
