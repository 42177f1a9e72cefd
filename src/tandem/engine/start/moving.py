"""Starts a rank's transfer thread, before and after the ranks know of each other."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import zmq

from tandem.engine.commands import STUCK_SECONDS
from tandem.engine.mailbox import Mailbox
from tandem.engine.start.rank import Published, Rank
from tandem.engine.step.runner import KvMemory
from tandem.errors import EngineFailed, StartError, TransferError
from tandem.ids import EngineIdentity
from tandem.transfer.thread.transfer_thread import LEADER_EVENTS, TransferThread, start_transfer_thread
from tandem.transfer.transports.base import RankEndpoint, Transport
from tandem.transfer.transports.registry import transport_factory
from tandem.wire.sockets import SocketOptions

log = logging.getLogger(__name__)

TRANSFER_START_SECONDS = 60.0
OTHERS_SECONDS = 300.0


class Moving:
    """Starts this rank's transfer thread, which makes the transport, and then waits to hear of the others.

    Args:
        end_process: ends this process, with the reason, when it cannot go on.
    """

    def __init__(
        self, rank: Rank, identity: EngineIdentity, memory: KvMemory, end_process: Callable[[str], None]
    ) -> None:
        self._rank = rank
        self._end_process = end_process
        self._number = rank.place.rank
        self._agent = f"{identity.engine_id}/{identity.incarnation}/{rank.place.rank}"
        self._memory = memory
        self._described: Mailbox[RankEndpoint | BaseException] = Mailbox()
        self._published: Mailbox[list[Published]] = Mailbox()
        self._serving = False
        start_transfer_thread(self._make, f"transfer_thread-{rank.place.rank}", self._failed)

    def endpoint(self) -> RankEndpoint:
        """How peers reach this rank. Raises what the transport raised."""
        described = self._described.wait(TRANSFER_START_SECONDS)
        if described is None:
            raise StartError(f"the transport did not start in {TRANSFER_START_SECONDS:.0f} s")
        if isinstance(described, BaseException):
            raise described
        return described

    def connect(self, published: list[Published]) -> None:
        """Let the transfer thread find the leader."""
        self._serving = True
        self._published.put(published)

    def _make(self) -> TransferThread:
        """In the transfer thread."""
        rank = self._rank
        make = transport_factory(rank.connector, rank.key)
        transport = make(self._agent, rank.place.host)
        transport.register(self._memory.region)
        self._described.put(transport.describe())
        published = self._published.wait(OTHERS_SECONDS)
        if published is None:
            raise StartError("the other ranks did not publish their memory")
        if len(published) > 1:
            _warm_up(transport, published[(self._number + 1) % len(published)].descriptor.endpoint)
        address = published[0].transfer_address
        assert address is not None
        options = SocketOptions(identity=b"%d" % self._number, monitor=LEADER_EVENTS)
        socket = rank.sockets.connect(zmq.DEALER, address.host, address.port, options)
        return TransferThread(self._number, [p.descriptor.layout for p in published], transport, socket)

    def _failed(self, error: BaseException) -> None:
        """In the transfer thread, as its last act."""
        if not self._serving:
            self._described.put(error)
            return
        if isinstance(error, EngineFailed):
            time.sleep(STUCK_SECONDS)  # this rank's step loop, if it does not hang, hears of it too and ends by itself
            self._end_process(str(error))
        self._end_process(f"the transfer thread of rank {self._number} died: {error or type(error).__name__}")


def _warm_up(transport: Transport, next_rank: RankEndpoint) -> None:
    """Open one connection before peers come: what a transport finds out by its first one, it knows from then on.

    With NIXL this is the choice of UCX's protocols, 15 to 25 ms of CPU time in each rank (docs/decisions/0019). In an
    engine of one rank the first peer pays for it.
    """
    try:
        transport.connect(next_rank)
        transport.disconnect(next_rank.agent)
    except TransferError as error:  # ranks of one engine need not reach each other's memory
        log.info("no connection to the next rank: %s", error)
