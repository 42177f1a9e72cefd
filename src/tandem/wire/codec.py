"""Typed messages to bytes and back: MessagePack, strict, bounded."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

from tandem.errors import WireError

M = TypeVar("M")

MAX_MESSAGE_BYTES = 64 * 1024 * 1024


class Codec(Generic[M]):
    """Encode any struct; decode strictly into one tagged union.

    Args:
        union: the message types a receiver of this channel accepts.
        limit: largest message in bytes.
    """

    def __init__(self, union: Any, limit: int = MAX_MESSAGE_BYTES) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(union)
        self._limit = limit

    def encode(self, message: Any) -> bytes:
        return self._encoder.encode(message)

    def decode(self, data: bytes | memoryview) -> M:
        """Decode one message. Raises WireError if `data` is too long or is not one of the union's messages."""
        if len(data) > self._limit:
            raise WireError(f"message of {len(data)} bytes; at most {self._limit} are accepted here")
        try:
            return self._decoder.decode(data)
        except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
            raise WireError(f"message of {len(data)} bytes is not of this channel: {error}") from None
