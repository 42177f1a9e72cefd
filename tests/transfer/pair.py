"""Prefill and decode sides without sockets, threads or clocks: their pure cores, joined by a network in memory."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from tandem.errors import PeerRefused
from tandem.ids import EngineIdentity
from tandem.transfer.decode.actions import Connect, Disconnect, Order, PullArrived, PullFailed, PullQuiet, Send
from tandem.transfer.decode.pull import Pull
from tandem.transfer.decode.pulls import Pulls
from tandem.transfer.handshake import check_hello
from tandem.transfer.prefill import offers
from tandem.transfer.prefill.offers import Offers
from tandem.transfer.thread.thread_messages import ClosePeer, OpenPeer, PeerOpened, ReadEnded, ReadOrder, ReadQuiet
from tandem.wire.engine_status import PeerInfo
from tandem.wire.messages import Address, Introduce, PeerAddress, PullKv
from tandem.wire.peer_messages import Claim, Envelope, Hello, Refused, Release, Renew, ToDecode, ToPrefill, Welcome
from tests.transfer.engines import ENVELOPE, descriptor

TICK = 0.1


class Network:
    """Delivers messages between engines in the order in which they were sent, at once; and has the only clock."""

    def __init__(self) -> None:
        self.now = 100.0
        self.prefills: dict[Address, Prefill] = {}
        self.decodes: list[Decode] = []
        self.lost: Callable[[object], bool] = lambda message: False
        self._queue: deque[Callable[[], None]] = deque()

    def prefill(
        self, engine_id: str = "p0", incarnation: str = "first", ttl: float = 10.0, *, at: Address | None = None
    ) -> Prefill:
        address = at or Address("127.0.0.1", 7000 + len(self.prefills))
        made = self.prefills[address] = Prefill(self, EngineIdentity(engine_id, incarnation), address, ttl)
        return made

    def decode(self, name: str = "d0", envelope: Envelope = ENVELOPE, ranks: int = 2) -> Decode:
        made = Decode(self, EngineIdentity(name, f"{name}-incarnation"), envelope, ranks)
        self.decodes.append(made)
        return made

    def post(self, delivery: Callable[[], None]) -> None:
        self._queue.append(delivery)

    def deliver(self) -> None:
        while self._queue:
            self._queue.popleft()()

    def pass_time(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now += TICK
            for prefill in list(self.prefills.values()):
                prefill.expire()
            for decode in self.decodes:
                decode.tick()
            self.deliver()


class Prefill:
    """A prefill engine; `heard` counts the messages that came to it by type."""

    def __init__(self, network: Network, identity: EngineIdentity, address: Address, ttl: float) -> None:
        self._network = network
        self.identity = identity
        self.address = address
        self.offers = Offers(identity.incarnation, ttl, 1000)
        self.heard: Counter[str] = Counter()
        self.ended: list[str] = []
        self.corrupt: list[str] = []
        described = msgspec.Raw(msgspec.msgpack.encode(descriptor(identity)))
        self.welcome = Welcome(ENVELOPE, identity, ttl, described)
        self._readers: dict[offers.Client, Decode] = {}

    def die(self) -> None:
        del self._network.prefills[self.address]

    def restart(self, incarnation: str) -> Prefill:
        """A new incarnation at its address."""
        return self._network.prefill(self.identity.engine_id, incarnation, at=self.address)

    # --- what the engine says ------------------------------------------------------------------------------------

    def begin(self, request_id: str) -> None:
        self.offers.begin(request_id)
        self._act()

    def chunk(
        self, request_id: str, first: int, blocks: list[int], tokens: int, final: bool, token: int | None = None
    ) -> None:
        self.offers.chunk(request_id, first, blocks, tokens, final, token, self._network.now)
        self._act()

    def offer(self, request_id: str, blocks: Iterable[int] = (5, 6), tokens: int = 8, token: int = 7) -> None:
        """A prompt, all at once."""
        self.begin(request_id)
        self.chunk(request_id, 0, list(blocks), tokens, True, token)

    def abort(self, request_id: str, reason: str) -> None:
        self.offers.abort(request_id, reason, self._network.now)
        self._act()

    def expire(self) -> None:
        self.offers.expire(self._network.now)
        self._act()

    def names(self, request_id: str, **fields: Any) -> PullKv:
        plain = PullKv(self.identity.engine_id, self.identity.incarnation, self.address, request_id)
        return msgspec.structs.replace(plain, **fields)

    def end_leases(self, request_id: str) -> None:
        """As if time had run out for all readers of a request."""
        for client in self._readers:
            self.offers.release(client, Release("", [request_id]), self._network.now)
        self._act()

    # --- what decode engines say -----------------------------------------------------------------------------------

    def receive(self, client: offers.Client, decode: Decode, message: ToPrefill) -> None:
        self.heard[type(message).__name__] += 1
        self._readers[client] = decode
        now = self._network.now
        match message:
            case Hello():
                self.answer(client, self._greet(message))
            case _ if message.to != self.identity.incarnation:
                self.answer(client, Refused(self.identity, "incarnation", self.identity.incarnation, message.to))
            case Claim():
                self.offers.claim(client, message, now)
            case Renew():
                self.offers.renew(client, message, now)
            case Release():
                self.offers.release(client, message, now)
        self._act()

    def _greet(self, hello: Hello) -> Welcome | Refused:
        try:
            check_hello(ENVELOPE, self.identity, hello)
        except PeerRefused as error:
            return Refused(self.identity, error.field, error.ours, error.theirs)
        return self.welcome

    def answer(self, client: offers.Client, message: ToDecode) -> None:
        if not self._network.lost(message):
            decode = self._readers[client]
            self._network.post(lambda: decode.receive(client, message))

    def _act(self) -> None:
        for action in self.offers.drain():
            match action:
                case offers.Send(client=client, message=message):
                    self.answer(client, message)
                case offers.OfferCorrupt(request_id=request_id):
                    self.corrupt.append(request_id)
                case offers.OfferEnded(request_id=request_id):
                    self.ended.append(request_id)
        self._network.deliver()


class Decode:
    """A decode engine whose ranks connect at once (unless `open_error`), and end reads when the test says so."""

    def __init__(self, network: Network, identity: EngineIdentity, envelope: Envelope, ranks: int) -> None:
        self._network = network
        self.identity = identity
        self.ranks = ranks
        self.pulls = Pulls(identity, envelope, [rank.layout for rank in descriptor(identity, tp=ranks).ranks])
        self.connected: dict[int, Address] = {}
        self.connections = 0
        self.open_error: str | None = None
        self.opened: list[OpenPeer] = []
        self.closed: list[int] = []
        self.reads: list[ReadOrder] = []
        self.arrived: list[Pull] = []
        self.failed: list[tuple[str, str]] = []
        self.first_tokens: dict[str, int | None] = {}  # of those that failed
        self.quiet: list[str] = []

    @property
    def peers(self) -> list[PeerInfo]:
        return self.pulls.peers

    def states(self) -> list[str]:
        return [peer.state for peer in self.peers]

    # --- what happens to it --------------------------------------------------------------------------------------

    def introduce(self, *engines: Prefill) -> None:
        peers = [PeerAddress(engine.identity, engine.address) for engine in engines]
        self.pulls.introduce(Introduce(peers), self._network.now)
        self._act()

    def open(self, request_id: str, source: PullKv, prompt: str | None = None) -> None:
        self.pulls.open(request_id, source, prompt, self._network.now)
        self._act()

    def pull(self, request_id: str, source: PullKv, tokens: int = 8) -> None:
        """Claim, and give it blocks at once."""
        self.open(request_id, source)
        self.pulls.allocated(request_id, [0, 1, 2], 0, tokens)
        self._act()

    def give_up(self, request_id: str) -> None:
        self.pulls.give_up(request_id, "aborted")
        self._act()

    def end(
        self,
        read: ReadOrder,
        rank: int,
        error: str | None = None,
        *,
        peer_lost: bool = False,
        may_still_write: bool = False,
        corrupt: bool = False,
    ) -> None:
        report = ReadEnded(rank, read.job, 100, 2, 0.01, error, peer_lost, may_still_write, corrupt)
        self.pulls.reported(report, self._network.now)
        self._act()

    def quieten(self, read: ReadOrder, rank: int) -> None:
        self.pulls.reported(ReadQuiet(rank, read.job), self._network.now)
        self._act()

    def end_reads(self) -> None:
        reads, self.reads = self.reads, []
        for read in reads:
            for rank in range(self.ranks):
                self.end(read, rank)

    def receive(self, client: offers.Client, message: ToDecode) -> None:
        session = int(client.rpartition(b"/")[2])
        if session in self.connected:
            self.pulls.received(session, message, self._network.now)
            self._act()

    def tick(self) -> None:
        for session in list(self.connected):
            self.pulls.tick(session, self._network.now)
        self.pulls.forget_ended(self._network.now)
        self._act()

    # --- what it does ----------------------------------------------------------------------------------------------

    def _act(self) -> None:
        for action in self.pulls.drain():
            match action:
                case Connect(session=session, address=address):
                    self.connected[session] = address
                    self.connections += 1
                case Disconnect(session=session):
                    del self.connected[session]
                case Send(session=session, message=message):
                    self._send(session, message)
                case Order(message=OpenPeer() as order, rank=int(rank)):
                    self.opened.append(order)
                    self._network.post(self._opens(order, rank))
                case Order(message=ClosePeer(session=session)):
                    self.closed.append(session)
                case Order(message=ReadOrder() as order):
                    self.reads.append(order)
                case PullArrived(pull=pull):
                    self.arrived.append(pull)
                case PullFailed(request_id=request_id, reason=reason, first_token=first_token):
                    self.failed.append((request_id, reason))
                    self.first_tokens[request_id] = first_token
                case PullQuiet(request_id=request_id):
                    self.quiet.append(request_id)
        self._network.deliver()

    def _send(self, session: int, message: ToPrefill) -> None:
        engine = self._network.prefills.get(self.connected[session])
        if engine is not None and not self._network.lost(message):
            self._network.post(lambda: engine.receive(f"{self.identity}/{session}".encode(), self, message))

    def _opens(self, order: OpenPeer, rank: int) -> Callable[[], None]:
        def report() -> None:
            self.pulls.reported(PeerOpened(rank, order.session, self.open_error), self._network.now)
            self._act()

        return report
