"""The leader's side of its ranks' transfer threads: orders out, reports in."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

import zmq
import zmq.asyncio

from tandem.errors import WireError
from tandem.transfer.orders import FromMover, MoverReady, Stop, ToMover
from tandem.wire.codec import Codec

log = logging.getLogger(__name__)


class Movers:
    """All transfer threads of one engine.

    Args:
        socket: ROUTER to which each transfer thread connects with its rank as identity.
        ranks: how many there are.
    """

    def __init__(self, socket: zmq.asyncio.Socket, ranks: int) -> None:
        self._socket = socket
        self.ranks = ranks
        self._codec: Codec[FromMover] = Codec(FromMover)
        self._here: set[int] = set()
        self.ready = asyncio.Event()

    async def run(self, on_report: Callable[[FromMover], None]) -> None:
        """Hand every report to `on_report`, until cancelled."""
        while True:
            _, data = await self._socket.recv_multipart()
            try:
                message = self._codec.decode(data)
            except WireError as error:
                log.error("report of a transfer thread dropped: %s", error)
                continue
            if isinstance(message, MoverReady):
                self._here.add(message.rank)
                if len(self._here) == self.ranks:
                    self.ready.set()
            else:
                on_report(message)

    def order(self, order: ToMover, ranks: Iterable[int] | None = None) -> None:
        """Send to these ranks, or to all."""
        data = self._codec.encode(order)
        for rank in range(self.ranks) if ranks is None else ranks:
            self._socket.send_multipart([b"%d" % rank, data])

    def stop(self) -> None:
        self.order(Stop())
