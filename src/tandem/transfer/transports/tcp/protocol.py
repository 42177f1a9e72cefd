"""Messages between the tcp transports of two ranks: the reader fetches, the server answers.

Every message names the agent that serves, so one that took over the port of another never answers for it. A
`FetchPiece` is followed by one more frame, the bytes of its runs one after the other.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from tandem.errors import WireError
from tandem.wire.codec import Codec
from tandem.wire.fields import Count, Name, Text
from tandem.wire.messages import Port

PIECE_BYTES = 2 * 1024 * 1024
PIECE_RUNS = 4096
WINDOW = 8
"""Pieces that a reader fetches at a time from one peer; neither side ever holds more of them."""

_OFFSET = np.dtype("<i8")
_Vector = Annotated[bytes, Meta(min_length=_OFFSET.itemsize, max_length=PIECE_RUNS * _OFFSET.itemsize)]


class ServerAddress(msgspec.Struct, frozen=True, tag="tandem-tcp-1"):
    """The metadata of a rank: the address at which it serves its memory."""

    host: Name
    port: Port


class Fetch(msgspec.Struct, frozen=True, tag="fetch"):
    """Ask for one piece of a read.

    Attributes:
        to: the agent that shall answer.
        read, piece: chosen by the reader; come back in the answer.
        offsets, lengths: of the runs in the server's region, in bytes, as little-endian int64.
    """

    to: Name
    read: Count
    piece: Count
    offsets: _Vector
    lengths: _Vector

    def runs(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return offsets and lengths. Raises WireError if they are not vectors of one size."""
        if len(self.offsets) != len(self.lengths) or len(self.offsets) % _OFFSET.itemsize:
            raise WireError(f"{len(self.offsets)} bytes of offsets do not fit {len(self.lengths)} bytes of lengths")
        return (
            np.frombuffer(self.offsets, _OFFSET).astype(np.int64),
            np.frombuffer(self.lengths, _OFFSET).astype(np.int64),
        )


def vector_bytes(values: NDArray[np.int64]) -> bytes:
    return values.astype(_OFFSET).tobytes()


class FetchPiece(msgspec.Struct, frozen=True, tag="piece"):
    """The bytes of a piece are in the next frame."""

    source: Name
    read: Count
    piece: Count


class FetchRefused(msgspec.Struct, frozen=True, tag="refused"):
    """The read cannot be answered."""

    source: Name
    read: Count
    reason: Text


FETCHES: Codec[Fetch] = Codec(Fetch, limit=2 * PIECE_RUNS * _OFFSET.itemsize + 4096)
ANSWERS: Codec[FetchPiece | FetchRefused] = Codec(FetchPiece | FetchRefused, limit=8192)
ADDRESSES: Codec[ServerAddress] = Codec(ServerAddress, limit=4096)
