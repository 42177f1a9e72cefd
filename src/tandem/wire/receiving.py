"""The receive loop of every listener: strict, and alive whatever a message does."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from typing import TypeVar

import zmq
import zmq.asyncio

from tandem.errors import WireError
from tandem.wire.codec import Codec

M = TypeVar("M")

BURST = 64
PAUSE_SECONDS = 0.001
"""After so many messages a receiver waits for so long: what waits for it is bounded by its socket, and a sender that
never stops would have the event loop to itself, as receiving what is there already does not yield."""

LOGGED_AT_FIRST = 10
LOGGED_EVERY = 1000


class DroppedMessages:
    """Counts the messages that a receiver drops; logs the first ten and then one in a thousand.

    Args:
        log: of the receiver's module.
        channel: names the channel in log lines, for example "peer".

    Attributes:
        count: messages dropped so far.
    """

    def __init__(self, log: logging.Logger, channel: str) -> None:
        self._log = log
        self._channel = channel
        self.count = 0

    def add(self, error: Exception) -> None:
        """Count one message. An error other than WireError is our own bug, so its traceback is logged."""
        self.count += 1
        if self.count <= LOGGED_AT_FIRST or self.count % LOGGED_EVERY == 0:
            bug = None if isinstance(error, WireError) else error
            self._log.warning("%s message %d dropped: %s", self._channel, self.count, error, exc_info=bug)


async def receive_messages(
    socket: zmq.asyncio.Socket, codec: Codec[M], handle: Callable[[bytes, M], None], dropped: DroppedMessages
) -> None:
    """Hand each message of a ROUTER or DEALER socket to `handle` with its sender (b"" on a DEALER), until cancelled.

    A message that is not of this channel, or that `handle` raises for, is counted in `dropped`; the next one is served.
    """
    routed = socket.type == zmq.ROUTER
    for number in itertools.count(1):
        if number % BURST == 0:
            await asyncio.sleep(PAUSE_SECONDS)
        frames = await socket.recv_multipart()
        sender = frames.pop(0) if routed else b""
        try:
            handle(sender, _decode(codec, frames))
        except Exception as error:
            dropped.add(error)


async def receive_with_connections(
    socket: zmq.asyncio.Socket,
    codec: Codec[M],
    handle: Callable[[bytes, int, M], None],
    handled: Callable[[], None],
    dropped: DroppedMessages,
) -> None:
    """As `receive_messages` on a ROUTER; `handle` also gets the file descriptor of the connection, as monitors do.

    `handled`: called after each message, also after one that was dropped.
    """
    for number in itertools.count(1):
        if number % BURST == 0:
            await asyncio.sleep(PAUSE_SECONDS)
        sender, *frames = await socket.recv_multipart(copy=False)
        try:
            message = _decode(codec, [frame.bytes for frame in frames])
            handle(sender.bytes, int(frames[0].get(zmq.SRCFD)), message)
        except Exception as error:
            dropped.add(error)
        handled()


def _decode(codec: Codec[M], frames: list[bytes]) -> M:
    if len(frames) != 1:
        raise WireError(f"a message has one frame; this one has {len(frames)}")
    return codec.decode(frames[0])
