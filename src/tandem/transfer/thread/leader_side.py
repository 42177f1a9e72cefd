"""The leader's side of its ranks' transfer threads: sends orders, receives reports."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import zmq
import zmq.asyncio

from tandem.errors import RankLost, WireError
from tandem.transfer.thread.thread_messages import (
    FromTransferThread,
    LeaderAlive,
    StopThread,
    ThreadAlive,
    ToTransferThread,
)
from tandem.wire.codec import Codec
from tandem.wire.fields import clip
from tandem.wire.receiving import DroppedMessages, receive_messages
from tandem.wire.silence import Silence

log = logging.getLogger(__name__)

WATCH_SECONDS = 1.0
SILENCE_SECONDS = 20.0
"""A transfer thread beats once a second, also while its rank computes."""


class TransferThreads:
    """All transfer threads of one engine.

    Args:
        socket: ROUTER to which each transfer thread connects with its rank as identity.
        ranks: how many there are.
    """

    def __init__(self, socket: zmq.asyncio.Socket, ranks: int) -> None:
        self._socket = socket
        self.ranks = ranks
        self._codec: Codec[FromTransferThread] = Codec(FromTransferThread)
        self._silence: Silence[int] = Silence(SILENCE_SECONDS, WATCH_SECONDS)
        self._dropped = DroppedMessages(log, "transfer thread")
        self.ready = asyncio.Event()

    async def run(self, on_report: Callable[[FromTransferThread], None]) -> None:
        """Hand every report to `on_report`, until cancelled."""

        def handle(sender: bytes, message: FromTransferThread) -> None:
            if message.rank >= self.ranks or sender != b"%d" % message.rank:
                raise WireError(f"{sender!r} speaks for rank {message.rank}")
            if isinstance(message, ThreadAlive):
                self._silence.heard(message.rank, time.monotonic())
                if len(self._silence) == self.ranks:
                    self.ready.set()
            else:
                on_report(message)

        await receive_messages(self._socket, self._codec, handle, self._dropped)

    async def watch(self) -> None:
        """Beat, and raise RankLost when a rank is not heard of any more."""
        await self.ready.wait()
        while True:
            self.order(LeaderAlive())
            await asyncio.sleep(WATCH_SECONDS)
            if silent := self._silence.look(time.monotonic()):
                raise RankLost(f"rank {silent[0]} of this engine was lost: it is not heard of any more")

    def order(self, order: ToTransferThread, rank: int | None = None) -> None:
        """Send to this rank, or to all."""
        data = self._codec.encode(order)
        for number in range(self.ranks) if rank is None else [rank]:
            self._socket.send_multipart([b"%d" % number, data])

    def stop(self, failed: str | None = None) -> None:
        """End all transfer threads, and where the engine has `failed`, the other ranks with the reason."""
        self.order(StopThread(), rank=0)
        for rank in range(1, self.ranks):
            self.order(StopThread(failed and clip(failed)), rank)
