"""The decode side of hand-offs: what prefill engines and transfer threads tell it, down to the reads that follow."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import msgspec
import zmq

from tandem.errors import TransferError
from tandem.ids import EngineIdentity
from tandem.kv.layout import block_major
from tandem.kv.runs import Runs
from tandem.kv.shard import shard
from tandem.transfer.decode.dialer import PeerDialer, PullEvents
from tandem.transfer.decode.pull import Pull
from tandem.transfer.thread.leader_side import TransferThreads
from tandem.transfer.thread.thread_messages import FromTransferThread, PeerOpened, ReadEnded, ReadQuiet
from tandem.transfer.thread.transfer_thread import TransferThread
from tandem.transfer.transports.base import RankEndpoint, ReadState, Region
from tandem.transfer.transports.bounds import runs_inside
from tandem.wire.codec import Codec
from tandem.wire.fields import Text
from tandem.wire.messages import Address, Introduce, PeerAddress, PullKv
from tandem.wire.peer_messages import (
    Claim,
    Claimed,
    Hello,
    KvComputed,
    KvGone,
    Refused,
    Renew,
    Renewed,
    ToDecode,
    ToPrefill,
    Welcome,
)
from tandem.wire.sampling import TokenId
from tests.fuzz.channel import Channel
from tests.fuzz.fakes import Clock, Defect, FakeSocket, FakeSockets, OwnErrors
from tests.fuzz.target import Target
from tests.transfer.engines import BLOCK_SIZE, ENVELOPE, descriptor

IDENTITY = EngineIdentity("d0", "reader")
PEERS = [EngineIdentity("p0", "life"), EngineIdentity("p1", "other")]
BLOCKS, PROMPT = 8, 8
REQUESTS = [f"r{number}" for number in range(8)]
TTL = 10.0
LAYOUTS = [
    block_major(
        shard(4, 4, tp=1, pp=1, tp_rank=0, pp_rank=0), blocks=BLOCKS, block_size=BLOCK_SIZE, head_dim=2, itemsize=4
    )
]
WELCOMES = [
    Welcome(ENVELOPE, peer, TTL, msgspec.Raw(msgspec.msgpack.encode(descriptor(peer, tp=tp))))
    for peer, tp in zip(PEERS, (1, 2), strict=True)
]
REAL = [
    *WELCOMES,
    *(Refused(peer, "fingerprint", "a", "b") for peer in PEERS),
    *(Claimed("life", request, 1) for request in REQUESTS),
    *(KvComputed("life", request, 0, [5, 6], PROMPT, True, 7) for request in REQUESTS),
    *(KvComputed("life", request, 0, [5], 4, False) for request in REQUESTS),
    KvGone("life", "r0", "the lease ended"),
    Renewed("life", 0, ["r1"]),
]
REPORTS = [
    PeerOpened(0, 1),
    PeerOpened(0, 2, "no way"),
    *(ReadEnded(0, job, 10, 1, 0.1) for job in range(1, 6)),
    ReadEnded(0, 2, 0, 0, 0.1, "broke", True, True),
    ReadQuiet(0, 2),
]


class FakeRead:
    state = ReadState.IN_PROGRESS
    error: str | None = None


class FakeTransport:
    """Checks the runs as real ones do, and ends reads in any of the ways in which they can end."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._own = Region(0, LAYOUTS[0].nbytes)
        self._peers: dict[str, RankEndpoint] = {}
        self.reads: list[tuple[str, FakeRead]] = []

    def connect(self, peer: RankEndpoint) -> None:
        if self._rng.random() < 0.02:
            raise TransferError("no connection")
        self._peers[peer.agent] = peer

    def disconnect(self, agent: str) -> None:
        self._peers.pop(agent, None)
        for _, read in (entry for entry in self.reads if entry[0] == agent):
            read.state, read.error = ReadState.FAILED, "disconnected"

    def post(self, agent: str, runs: Runs) -> FakeRead:
        if agent not in self._peers:
            raise TransferError(f"{agent} is not connected")
        runs_inside(runs, self._peers[agent].region, self._own)
        read = FakeRead()
        self.reads.append((agent, read))
        return read

    def poll(self) -> None:
        for _, read in self.reads:
            if read.state is ReadState.IN_PROGRESS and self._rng.random() < 0.5:
                read.state = self._rng.choice([*[ReadState.DONE] * 18, ReadState.FAILED, ReadState.FAILING])
            elif read.state is ReadState.FAILING and self._rng.random() < 0.5:
                read.state = ReadState.FAILED
        self.reads = [
            (agent, read) for agent, read in self.reads if read.state in (ReadState.IN_PROGRESS, ReadState.FAILING)
        ]


class FakeThreadSocket:
    """The transfer thread's end of its socket: orders come from the leader's end, reports go there."""

    def __init__(self, leader: FakeSocket) -> None:
        self._leader = leader

    def get_monitor_socket(self, events: int = 0) -> None:
        return None

    def recv(self, flags: int = 0) -> bytes:
        if not self._leader.sent:
            raise zmq.Again
        return self._leader.sent.popleft()[1]

    def send(self, data: bytes) -> None:
        self._leader.put(b"0", data)


class Decode(Target):
    """Every pull arrives or fails, not both; then its blocks become quiet, once; nothing is read out of bounds."""

    NAME = "decode"

    def __init__(self, rng: random.Random, clock: Clock, errors: OwnErrors) -> None:
        super().__init__(rng, clock, errors)
        self._sockets, leader = FakeSockets(), FakeSocket(zmq.ROUTER)
        self._leader = leader
        self._threads = TransferThreads(leader, 1)  # type: ignore[arg-type]
        self._transport: Any = FakeTransport(rng)
        self._thread = TransferThread(0, LAYOUTS, self._transport, FakeThreadSocket(leader))  # type: ignore[arg-type]
        self._open: set[str] = set()
        self._loud: Counter[str] = Counter()
        self._arrived: list[Pull] = []
        events = PullEvents(self._on_arrived, self._on_failed, self._on_quiet)
        self._dialer = PeerDialer(IDENTITY, ENVELOPE, LAYOUTS, self._threads, self._sockets, events)  # type: ignore[arg-type]
        names = ["life", "other", "p0", "p1", *REQUESTS]
        self._peers = Channel(ToDecode, REAL, names, range(12), valid=0.5)
        self._reports = Channel(FromTransferThread, REPORTS, (), range(12), valid=0.5)
        self._heard: Codec[ToPrefill] = Codec(ToPrefill)
        self._count = 0

    def _on_arrived(self, pull: Pull) -> None:
        if pull.request_id not in self._open:
            raise Defect(f"{pull.request_id} arrived, but it had ended")
        if pull.announced_tokens != PROMPT:
            raise Defect(f"{pull.announced_tokens} tokens arrived of {PROMPT}")
        self._open.discard(pull.request_id)
        self._arrived.append(pull)

    def _on_failed(self, request_id: str, reason: str, first_token: int | None) -> None:
        if request_id not in self._open:
            raise Defect(f"{request_id} failed, but it had ended")
        msgspec.convert(reason, Text)
        msgspec.convert(first_token, TokenId | None)
        self._open.discard(request_id)
        self._loud[request_id] += 1

    def _on_quiet(self, request_id: str) -> None:
        self._loud[request_id] -= 1

    async def begin(self) -> None:
        self.spawn(self._threads.run(self._dialer.reported))
        self.spawn(self._dialer.run())
        self._introduce()

    def _introduce(self) -> None:
        addresses = [PeerAddress(peer, Address("127.0.0.1", 7000 + i)) for i, peer in enumerate(PEERS)]
        self._dialer.introduce(Introduce(addresses))

    async def feed(self) -> None:
        rng = self.rng
        if rng.random() < 0.3:
            self._live()
        socket = rng.choice([one for one in self._sockets.made if not one.closed] or [FakeSocket()])
        if rng.random() < 0.8:
            self._answer(socket)
            await self._settle()
        if rng.random() < 0.85:
            self.last = self._peers.data(rng)
            socket.put(*([self.last] if rng.random() < 0.98 else [self.last] * rng.choice([0, 2])))
        else:
            self.last = self._reports.data(rng)
            self._leader.put(rng.choice([b"0", b"1", b""]), self.last)
        await self._settle()
        if rng.random() < 0.1:
            await self.clock.advance(rng.choice([0.2, 2.5, 2.5, TTL / 3, 2 * TTL]))

    async def _settle(self) -> None:
        for _ in range(2):
            if self._leader.sent or self._transport.reads:
                self._thread.step()
            for socket in self._sockets.made[-8:]:
                if not socket.closed:
                    await socket.taken()
            await self._leader.taken()

    def _answer(self, socket: FakeSocket) -> None:
        """Answer as a prefill engine does."""
        number = self._sockets.made.index(socket) % 2 if socket in self._sockets.made else 0
        while socket.sent:
            match self._heard.decode(socket.sent.popleft()[0]):
                case Hello(expected_engine_id=engine_id):
                    answers: list[Any] = [WELCOMES[engine_id == "p1"]]
                case Claim(to=to, request_id=request, number=number):
                    chunk = KvComputed(to, request, 0, [1, 2], PROMPT, True, 7)
                    answers = [Claimed(to, request, number), chunk]
                    self._peers.learn(answers[0])
                case Renew(to=to, seq=seq):
                    answers = [Renewed(to, seq, [])]
                case _:
                    answers = []
            for answer in answers:
                socket.put(msgspec.msgpack.encode(answer))

    def _live(self) -> None:
        """Do as the engine does: claim a prompt's KV, give it blocks, give it up, hear of engines."""
        rng, request = self.rng, self.rng.choice(REQUESTS)
        chance = rng.random()
        if request in self._open:
            if chance < 0.7:
                self._dialer.allocated(request, rng.sample(range(BLOCKS), PROMPT // BLOCK_SIZE), 0, PROMPT)
            else:
                self._give_up(request)
        elif not self._dialer.knows(request) and not self._loud[request]:
            peer, port = rng.choice([(PEERS[0], 7000), (PEERS[1], 7001), (PEERS[0], 7009)])
            incarnation = rng.choice([peer.incarnation, peer.incarnation, None])
            self._open.add(request)
            self._count += 1
            foreign = rng.random() < 0.2
            remote = rng.choice([request, "r0"])
            pull = PullKv(peer.engine_id, incarnation, Address("127.0.0.1", port), remote, not foreign, foreign)
            self._dialer.open(request, pull, None)
        if chance < 0.05:
            self._introduce()

    def _give_up(self, request: str) -> None:
        self._open.discard(request)
        self._loud[request] += 1
        self._dialer.give_up(request, "the end")

    async def end(self) -> None:
        for request in list(self._open):
            self._give_up(request)
        for _ in range(40):
            await self._settle()
        loud = +self._loud
        if loud or -self._loud:
            raise Defect(f"blocks of {dict(self._loud)} are not quiet, or more than once")
        if any(self._dialer.knows(request) for request in REQUESTS):
            raise Defect("a request is known after its end")
        if len(self._dialer.peers) > 200:
            raise Defect(f"{len(self._dialer.peers)} sessions")
