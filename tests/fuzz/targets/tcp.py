"""The tcp transport: a server that is asked nonsense, and a reader that is answered with it, over loopback."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import numpy as np
import zmq

from tandem.errors import TransferError, WireError
from tandem.kv.runs import Runs
from tandem.transfer.transports.base import RankEndpoint, ReadState, Region
from tandem.transfer.transports.tcp.client import TcpTransport
from tandem.transfer.transports.tcp.protocol import (
    ADDRESSES,
    ANSWERS,
    FETCHES,
    Fetch,
    FetchPiece,
    FetchRefused,
    ServerAddress,
    vector_bytes,
)
from tests.fuzz.channel import Channel
from tests.fuzz.fakes import Clock, Defect, OwnErrors
from tests.fuzz.target import Target

SIZE = 4096
MARK = 0xA5


class Tcp(Target):
    """The server gives out its region alone; the reader writes where its reads go, and nowhere else."""

    NAME = "tcp"

    def __init__(self, rng: random.Random, clock: Clock, errors: OwnErrors) -> None:
        super().__init__(rng, clock, errors)
        self._memory = np.full(SIZE, MARK, np.uint8)
        self._transport = TcpTransport("reader", "127.0.0.1")
        self._transport.register(Region(self._memory.ctypes.data, SIZE))
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._client = self._context.socket(zmq.DEALER)
        address = ADDRESSES.decode(self._transport.describe().metadata)
        self._client.connect(f"tcp://{address.host}:{address.port}")
        self._rogue = self._context.socket(zmq.ROUTER)
        self._port = self._rogue.bind_to_random_port("tcp://127.0.0.1")
        self._peers = 0
        self._agent = ""
        offsets = [vector_bytes(np.array(values, np.int64)) for values in ([0], [0, 64], [SIZE - 1], [-1], [2**62])]
        lengths = [vector_bytes(np.array(values, np.int64)) for values in ([SIZE], [64, 64], [1], [SIZE], [2**62])]
        fetches = [Fetch("reader", 1, 0, *pair) for pair in zip(offsets, lengths, strict=True)]
        self._fetches = Channel(Fetch, fetches, ["reader"], range(8))
        answers = [FetchPiece("rogue", 1, 0), FetchPiece("rogue", 2, 0), FetchRefused("rogue", 1, "no")]
        self._answers = Channel(FetchPiece | FetchRefused, answers, ["rogue"], range(8), valid=0.6)
        self._destination = np.zeros(SIZE, bool)
        self._reads: list[Any] = []

    async def feed(self) -> None:
        if self.rng.random() < 0.5:
            self._ask()
        else:
            self._mislead()
        self._transport.poll()
        if (self._memory[~self._destination] != MARK).any():
            raise Defect("bytes were written where no read goes")

    def _ask(self) -> None:
        """Send a fetch, and look at what comes back."""
        self.last = self._fetches.data(self.rng)
        self._client.send_multipart([self.last] * (1 if self.rng.random() < 0.98 else 2))
        while self._client.poll(0):
            head, *rest = self._client.recv_multipart()
            answer = ANSWERS.decode(head)
            if isinstance(answer, FetchPiece) != bool(rest) or sum(map(len, rest)) > SIZE:
                raise Defect(f"{answer} with {[len(part) for part in rest]} bytes")

    def _mislead(self) -> None:
        """Read from a server that answers as it likes."""
        try:
            if self._agent and self.rng.random() < 0.3:
                self._reads.append(self._transport.post(self._agent, self._runs()))
        except TransferError:
            self._transport.disconnect(self._agent)
            self._agent = ""
        if not self._agent:
            self._connect()
        while self._rogue.poll(0):
            sender, data = self._rogue.recv_multipart()
            fetch = FETCHES.decode(data)
            size = int(fetch.runs()[1].sum())
            self._answer(sender, fetch, size)

    def _answer(self, sender: bytes, fetch: Fetch, size: int) -> None:
        rng = self.rng
        self._answers.learn(FetchPiece(fetch.to, fetch.read, fetch.piece))
        data = rng.randbytes(size if rng.random() < 0.8 else rng.choice([0, 1, size + 1, 2 * size]))
        if rng.random() < 0.5:
            self.last = ANSWERS.encode(FetchPiece(fetch.to, fetch.read, fetch.piece))
        else:
            self.last = self._answers.data(rng)
        self._rogue.send_multipart(
            [sender, self.last, *([data] if rng.random() < 0.9 else [data] * rng.choice([0, 2]))]
        )

    def _connect(self) -> None:
        self._peers += 1
        self._agent = f"rogue-{self._peers}"
        metadata = ADDRESSES.encode(ServerAddress("127.0.0.1", self._port))
        try:
            self._transport.connect(RankEndpoint(self._agent, metadata, Region(0, self.rng.choice([SIZE, 2**62]))))
        except (TransferError, WireError):
            self._agent = ""

    def _runs(self) -> Runs:
        count = self.rng.randint(1, 3)
        length = self.rng.choice([1, 16, 64])
        at = np.array([self.rng.randrange(0, SIZE - length) for _ in range(count)], np.int64)
        for start in at.tolist():
            self._destination[start : start + length] = True
        source = np.array([self.rng.choice([0, 7, SIZE - length]) for _ in range(count)], np.int64)
        return Runs(source, at, np.full(count, length, np.int64))

    async def end(self) -> None:
        for number in range(1, self._peers + 1):
            self._transport.disconnect(f"rogue-{number}")
        if any(read.state is ReadState.IN_PROGRESS for read in self._reads):
            raise Defect("a read goes on after its peer was disconnected")
        for _ in range(2000):
            self._client.send(
                FETCHES.encode(
                    Fetch("reader", 7, 7, vector_bytes(np.zeros(1, np.int64)), vector_bytes(np.ones(1, np.int64)))
                )
            )
            self._transport.poll()
            if self._client.poll(5):
                break
        else:
            raise Defect("the server answers nobody any more")

    async def close(self) -> None:
        self._transport.close()
        await asyncio.sleep(0)
        self._context.destroy(linger=0)
        await super().close()
