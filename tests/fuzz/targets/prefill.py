"""The peer listener of a prefill engine: handshakes, claims, renewals and releases of decode engines."""

from __future__ import annotations

import random
from collections import Counter

import zmq

from tandem.ids import EngineIdentity
from tandem.transfer.prefill.listener import PeerListener
from tandem.wire.peer_messages import Claim, Hello, Release, Renew, ToPrefill
from tests.fuzz.channel import Channel
from tests.fuzz.fakes import Clock, Defect, FakeSocket, OwnErrors
from tests.fuzz.target import Target
from tests.transfer.engines import ENVELOPE, descriptor

IDENTITY = EngineIdentity("p0", "life")
READER = EngineIdentity("d0", "reader")
REQUESTS = [f"r{number}" for number in range(6)]
CLIENTS = [b"reader/1", b"reader/2", b"\0auto", b"x" * 255]
TTL = 10.0
REAL = [
    Hello(ENVELOPE, READER, "p0", "life"),
    Hello(ENVELOPE, READER, "p0"),
    *(Claim("life", request, prompt) for request in REQUESTS for prompt in (None, "digest")),
    Renew("life", 0, REQUESTS),
    Renew("life", 1, ["r1", "r1", "unknown"]),
    Release("life", ["r0"]),
    Release("life", REQUESTS),
]


class Prefill(Target):
    """Blocks of every request go back to the engine, once; all else is forgotten when its time is over."""

    NAME = "prefill"

    def __init__(self, rng: random.Random, clock: Clock, errors: OwnErrors) -> None:
        super().__init__(rng, clock, errors)
        self._socket = FakeSocket(zmq.ROUTER)
        self._ended: Counter[str] = Counter()
        self._begun: dict[str, int] = {}
        self._channel = Channel(ToPrefill, REAL, ["life", "p0", "digest", *REQUESTS], valid=0.4)
        self._listener = PeerListener(
            self._socket,  # type: ignore[arg-type]
            IDENTITY,
            ENVELOPE,
            descriptor(IDENTITY),
            TTL,
            self._ended.update,
        )
        self._count = 0

    async def begin(self) -> None:
        self.spawn(self._listener.run())

    async def feed(self) -> None:
        if self.rng.random() < 0.2:
            self._live()
        self.last = self._channel.data(self.rng)
        frames = [self.last] if self.rng.random() < 0.98 else [self.last] * self.rng.choice([0, 2])
        self._socket.put(self.rng.choice(CLIENTS), *frames)
        await self._socket.taken()
        self._socket.sent.clear()
        if self.rng.random() < 0.02:
            await self.clock.advance(self.rng.choice([0.3, TTL / 2, 2 * TTL]))

    def _live(self) -> None:
        """Do as the engine does: begin a request, compute a chunk of one, or end one early."""
        listener, rng = self._listener, self.rng
        request = rng.choice(REQUESTS)
        if request not in self._begun:
            if not listener.knows(request):
                listener.begin(request, prompt=rng.choice([None, "digest"]))
                self._begun[request] = 0
                self._count += 1
        elif rng.random() < 0.3:
            listener.abort(request, "the client has gone")
            del self._begun[request]
        else:
            done = self._begun[request] + 1
            final = rng.random() < 0.5
            listener.chunk(request, done - 1, [done], 4 * done, final, 7 if final else None)
            self._begun[request] = done
            if final:
                del self._begun[request]

    async def end(self) -> None:
        for request in list(self._begun):
            self._listener.abort(request, "the end")
        for _ in range(3):
            await self.clock.advance(2 * TTL)
        if self._ended.total() != self._count:
            raise Defect(f"{self._count} requests had blocks, {self._ended.total()} gave them back")
        if any(self._listener.knows(request) for request in REQUESTS):
            raise Defect("a request is known after its end")
