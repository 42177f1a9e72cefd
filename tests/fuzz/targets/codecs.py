"""Every channel's codec: a message of the channel, or WireError."""

from __future__ import annotations

import random
from typing import Any

from tandem.errors import WireError
from tandem.ids import EngineIdentity
from tandem.transfer.handshake import EngineDescriptor, decode_descriptor
from tandem.transfer.thread.thread_messages import FromTransferThread, ToTransferThread
from tandem.transfer.transports.tcp.protocol import (
    ADDRESSES,
    ANSWERS,
    FETCHES,
    Fetch,
    FetchPiece,
    FetchRefused,
    ServerAddress,
)
from tandem.wire.codec import Codec
from tandem.wire.messages import ToEngine, ToFrontend
from tandem.wire.peer_messages import ToDecode, ToPrefill
from tests.fuzz.channel import Channel
from tests.fuzz.fakes import Clock, OwnErrors
from tests.fuzz.target import Target
from tests.transfer.engines import descriptor

CODECS: list[tuple[Any, Codec[Any]]] = [
    *(
        (kind, Codec(kind))
        for kind in (ToEngine, ToFrontend, ToPrefill, ToDecode, ToTransferThread, FromTransferThread)
    ),
    (Fetch, FETCHES),
    (FetchPiece | FetchRefused, ANSWERS),
    (ServerAddress, ADDRESSES),
]
IDENTITY = EngineIdentity("p0", "life")


class Codecs(Target):
    NAME = "codecs"
    INPUTS = 1000

    def __init__(self, rng: random.Random, clock: Clock, errors: OwnErrors) -> None:
        super().__init__(rng, clock, errors)
        self._channels = [(Channel(kind), codec) for kind, codec in CODECS]
        self._descriptors = Channel(EngineDescriptor, [descriptor(IDENTITY, tp=2), descriptor(IDENTITY, pp=2)])

    async def feed(self) -> None:
        try:
            if self.rng.random() < 0.3:
                self.last = self._descriptors.data(self.rng)
                decode_descriptor(self.last)
            else:
                channel, codec = self.rng.choice(self._channels)
                self.last = channel.data(self.rng)
                codec.encode(codec.decode(self.last))
        except WireError:
            pass
