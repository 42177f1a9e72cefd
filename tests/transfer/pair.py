"""Prefill and decode sides that talk over real sockets in one event loop; transfer threads are played by the test."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import zmq
import zmq.asyncio

from tandem.errors import ConfigError
from tandem.ids import EngineIdentity
from tandem.transfer.decode.consumer import Consumer, ConsumerEvents
from tandem.transfer.decode.pulls import Pull
from tandem.transfer.prefill.listener import PeerListener
from tandem.transfer.thread.orders import ClosePeer, OpenPeer, PeerOpened, ReadEnded, ReadOrder, ToTransferThread
from tandem.wire import messages
from tandem.wire.messages import Address
from tandem.wire.peer_messages import Envelope
from tandem.wire.sockets import SocketOptions, Sockets
from tests.transfer.engines import ENVELOPE, descriptor

HOST = "127.0.0.1"
PATIENCE = 20.0


async def until(happened: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not happened():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


class CountingSockets(Sockets[zmq.asyncio.Socket]):
    connected = 0

    def connect(self, *args: Any, **kwargs: Any) -> zmq.asyncio.Socket:
        self.connected += 1
        return super().connect(*args, **kwargs)


class Prefill:
    """A listener; `heard` counts the messages that came to it by type."""

    def __init__(
        self, sockets: Sockets[zmq.asyncio.Socket], name: str, life: str, envelope: Envelope, ttl: float, port: int
    ) -> None:
        self.identity = EngineIdentity(name, life)
        self.heard: Counter[str] = Counter()
        self.ended: list[str] = []
        self.described = descriptor(self.identity)
        socket, self.port = sockets.bind(zmq.ROUTER, HOST, port, SocketOptions(handover=True))
        self.listener = PeerListener(socket, self.identity, envelope, self.described, ttl, self.ended.extend)
        handle = self.listener._handle

        def counted(client: bytes, message: Any) -> None:
            self.heard[type(message).__name__] += 1
            handle(client, message)

        self.listener._handle = counted
        self.task = asyncio.create_task(self.listener.run())

    @property
    def address(self) -> Address:
        return Address(HOST, self.port)

    def offer(self, request_id: str, blocks: Iterable[int] = (5, 6), tokens: int = 8, token: int = 7) -> None:
        """A prompt, all at once."""
        self.listener.begin(request_id)
        self.listener.chunk(request_id, 0, list(blocks), tokens, True, token)

    def names(self, request_id: str, **fields: Any) -> messages.PullKv:
        plain = dict(engine_id=self.identity.engine_id, incarnation=self.identity.incarnation, address=self.address)
        return messages.PullKv(**(plain | dict(remote_request_id=request_id) | fields))

    async def die(self) -> None:
        await asyncio.sleep(0)  # a task that was cancelled before it began closes nothing
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


class FakeMovers:
    """Transfer threads that connect at once (unless `open_error`), and end reads when the test says so."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.orders: list[tuple[int, ToTransferThread]] = []
        self.reads: list[ReadOrder] = []
        self.open_error: str | None = None
        self.report: Callable[[Any], None] = lambda report: None

    def order(self, order: ToTransferThread, ranks: Iterable[int] | None = None) -> None:
        chosen = list(range(self.ranks) if ranks is None else ranks)
        self.orders += [(rank, order) for rank in chosen]
        if isinstance(order, ReadOrder):
            self.reads.append(order)
        elif isinstance(order, OpenPeer):
            for rank in chosen:
                answer = PeerOpened(rank, order.peer, self.open_error)
                asyncio.get_running_loop().call_soon(self.report, answer)

    def end(self, read: ReadOrder, rank: int, error: str | None = None, *, peer_lost: bool = False) -> None:
        self.report(ReadEnded(rank, read.job, 100, 2, 0.01, error, peer_lost))

    def closed(self) -> list[str]:
        return [order.peer for rank, order in self.orders if isinstance(order, ClosePeer) and rank == 0]


class Decode:
    def __init__(self, sockets: CountingSockets, name: str, envelope: Envelope, ranks: int) -> None:
        self.identity = EngineIdentity(name, f"{name}-life")
        self.sockets = sockets
        self.arrived: list[Pull] = []
        self.failed: list[tuple[str, str]] = []
        self.quiet: list[str] = []
        self.transfer_threads = FakeMovers(ranks)
        layouts = [rank.layout for rank in descriptor(self.identity, tp=ranks).ranks]
        events = ConsumerEvents(self.arrived.append, lambda *told: self.failed.append(told), self.quiet.append)
        self.consumer = Consumer(self.identity, envelope, layouts, self.transfer_threads, sockets, events)
        self.transfer_threads.report = self.consumer.reported

    def pull(self, request_id: str, source: messages.PullKv, tokens: int = 8) -> None:
        """Claim, and give it blocks at once."""
        self.consumer.open(request_id, source)
        self.consumer.allocated(request_id, [0, 1, 2], 0, tokens)

    def end_reads(self, error: str | None = None) -> None:
        reads, self.transfer_threads.reads = self.transfer_threads.reads, []
        for read in reads:
            for rank in range(self.transfer_threads.ranks):
                self.transfer_threads.end(read, rank, error)

    async def reading(self) -> ReadOrder:
        await until(lambda: self.transfer_threads.reads)
        return self.transfer_threads.reads[0]

    def states(self) -> list[str]:
        return [peer.state for peer in self.consumer.peers]


class Stage:
    """Makes engines, and ends them."""

    def __init__(self) -> None:
        self.context = zmq.asyncio.Context()
        self.prefills: list[Prefill] = []
        self.decodes: list[Decode] = []

    def prefill(
        self, name: str = "p0", life: str = "life", envelope: Envelope = ENVELOPE, ttl: float = 30.0, port: int = 0
    ) -> Prefill:
        made = Prefill(Sockets(self.context, None), name, life, envelope, ttl, port)
        self.prefills.append(made)
        return made

    async def restart(self, old: Prefill, life: str) -> Prefill:
        """A new life of an engine that died, at its address; libzmq gives that up a moment after the socket closed."""
        made: list[Prefill] = []

        def starts() -> bool:
            try:
                made.append(self.prefill(old.identity.engine_id, life, port=old.port))
            except ConfigError:
                return False
            return True

        await until(starts)
        return made[0]

    def decode(self, name: str = "d0", envelope: Envelope = ENVELOPE, ranks: int = 2) -> Decode:
        made = Decode(CountingSockets(self.context, None), name, envelope, ranks)
        self.decodes.append(made)
        return made


@asynccontextmanager
async def stage() -> AsyncIterator[Stage]:
    made = Stage()
    try:
        yield made
        broken = [p.task.exception() for p in made.prefills if p.task.done() and not p.task.cancelled()]
        assert not broken, broken
    finally:
        for decode in made.decodes:
            decode.consumer.close()
        for prefill in made.prefills:
            await prefill.die()
        made.context.destroy(linger=0)
