"""The leader's side of its ranks' transfer threads."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import zmq
import zmq.asyncio

from tandem.errors import EngineFailed
from tandem.transfer.thread import leader_side as module
from tandem.transfer.thread.leader_side import TransferThreads
from tandem.transfer.thread.thread_messages import FromTransferThread, PeerOpened, ThreadAlive
from tandem.wire.codec import Codec
from tandem.wire.sockets import SocketOptions, Sockets

SECONDS = 10


def test_only_a_rank_speaks_for_itself_and_nonsense_ends_nothing() -> None:
    async def play() -> list[FromTransferThread]:
        context = zmq.asyncio.Context()
        sockets: Sockets[zmq.asyncio.Socket] = Sockets(context, None)
        listener, port = sockets.bind(zmq.ROUTER, "127.0.0.1", 0)
        codec: Codec[FromTransferThread] = Codec(FromTransferThread)
        transfer_threads, heard = TransferThreads(listener, 2), asyncio.Queue[FromTransferThread]()
        running = asyncio.create_task(transfer_threads.run(heard.put_nowait))
        ranks = [
            sockets.connect(zmq.DEALER, "127.0.0.1", port, SocketOptions(identity=b"%d" % rank)) for rank in (0, 1)
        ]
        bad: list[list[bytes]] = [
            [b"no", b"message"], [], [b"\xff"], [codec.encode(ThreadAlive(1))], [codec.encode(PeerOpened(999, 1))],
        ]  # fmt: skip
        for frames in bad:
            await ranks[0].send_multipart(frames or [b""])
        await ranks[0].send(codec.encode(PeerOpened(0, 1)))
        found = [await heard.get()]
        assert not transfer_threads.ready.is_set()
        for rank, socket in enumerate(ranks):
            await socket.send(codec.encode(ThreadAlive(rank)))
        await transfer_threads.ready.wait()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        context.destroy(linger=0)
        return found

    assert asyncio.run(asyncio.wait_for(play(), SECONDS)) == [PeerOpened(0, 1)]


def test_a_rank_that_falls_silent_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WATCH_SECONDS", 0.05)
    monkeypatch.setattr(module, "SILENCE_SECONDS", 0.2)

    async def play() -> Any:
        context = zmq.asyncio.Context()
        sockets: Sockets[zmq.asyncio.Socket] = Sockets(context, None)
        listener, port = sockets.bind(zmq.ROUTER, "127.0.0.1", 0)
        transfer_threads = TransferThreads(listener, 1)
        running = asyncio.create_task(transfer_threads.run(lambda report: None))
        rank = sockets.connect(zmq.DEALER, "127.0.0.1", port, SocketOptions(identity=b"0"))
        await rank.send(Codec(FromTransferThread).encode(ThreadAlive(0)))
        with pytest.raises(EngineFailed, match="rank 0 of this engine was lost"):
            await transfer_threads.watch()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        context.destroy(linger=0)

    asyncio.run(asyncio.wait_for(play(), SECONDS))
