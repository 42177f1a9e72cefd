"""The leader's side of its ranks' transfer threads: orders out, reports in."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable

import zmq
import zmq.asyncio

from tandem.errors import RankLost, WireError
from tandem.transfer.thread.orders import FromTransferThread, StopThread, ThreadAlive, ToTransferThread
from tandem.wire.codec import Codec

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
        self._heard: dict[int, float] = {}
        self.ready = asyncio.Event()

    async def run(self, on_report: Callable[[FromTransferThread], None]) -> None:
        """Hand every report to `on_report`, until cancelled."""
        while True:
            sender, *rest = await self._socket.recv_multipart()
            try:
                message = self._codec.decode(rest[0] if len(rest) == 1 else b"")
                if message.rank >= self.ranks or sender != b"%d" % message.rank:
                    raise WireError(f"{sender!r} speaks for rank {message.rank}")
            except WireError as error:
                log.error("report of a transfer thread dropped: %s", error)
                continue
            if isinstance(message, ThreadAlive):
                self._heard[message.rank] = time.monotonic()
                if len(self._heard) == self.ranks:
                    self.ready.set()
            else:
                on_report(message)

    async def watch(self) -> None:
        """Raises RankLost when a rank is not heard of any more."""
        await self.ready.wait()
        while True:
            before = time.monotonic()
            await asyncio.sleep(WATCH_SECONDS)
            overslept = time.monotonic() - before > 2 * WATCH_SECONDS
            silent = [r for r, heard in self._heard.items() if time.monotonic() - heard > SILENCE_SECONDS]
            if silent and not overslept:
                raise RankLost(f"rank {silent[0]} of this engine was lost: it is not heard of any more")

    def order(self, order: ToTransferThread, ranks: Iterable[int] | None = None) -> None:
        """Send to these ranks, or to all."""
        data = self._codec.encode(order)
        for rank in range(self.ranks) if ranks is None else ranks:
            self._socket.send_multipart([b"%d" % rank, data])

    def stop(self) -> None:
        self.order(StopThread())
