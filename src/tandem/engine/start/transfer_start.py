"""Starts a rank's transfer thread, in two steps: before and after the ranks know of each other's memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future

import zmq

from tandem.engine.start.engine_map import EngineMap
from tandem.engine.start.rank import Rank
from tandem.engine.step.runner import KvMemory
from tandem.engine.timeouts import PEERS_SECONDS, STUCK_SECONDS, TRANSPORT_SECONDS
from tandem.errors import EngineFailed, RankLost, StartError, TandemError, TransferError
from tandem.ids import EngineIdentity
from tandem.transfer.thread.transfer_thread import TransferThread, start_transfer_thread
from tandem.transfer.transports.base import RankEndpoint, Transport
from tandem.transfer.transports.registry import transport_factory

log = logging.getLogger(__name__)


class TransferStart:
    """Starts the thread, which makes the transport and then waits to hear of the other ranks.

    Args:
        end_process: ends this process, with the error, when its transfer thread has died.
    """

    def __init__(
        self, rank: Rank, identity: EngineIdentity, memory: KvMemory, end_process: Callable[[TandemError], None]
    ) -> None:
        self._rank = rank
        self._number = rank.placement.rank
        self._agent = f"{identity.engine_id}/{identity.incarnation}/{self._number}"
        self._memory = memory
        self._end_process = end_process
        self._endpoint: Future[RankEndpoint] = Future()
        self._engine: Future[tuple[EngineMap, Callable[[], zmq.Socket[bytes]]]] = Future()
        start_transfer_thread(self._make, f"transfer-{self._number}", self._failed)

    def endpoint(self) -> RankEndpoint:
        """Return the address under which peers reach this rank's memory. Raises what the transport raised."""
        try:
            return self._endpoint.result(TRANSPORT_SECONDS)
        except TimeoutError:
            raise StartError(f"the transport did not start in {TRANSPORT_SECONDS:.0f} s") from None

    def connect(self, engine: EngineMap, open_socket: Callable[[], zmq.Socket[bytes]]) -> None:
        """Let the thread serve the leader. `open_socket`: called in the thread, returns the connection to it."""
        self._engine.set_result((engine, open_socket))

    # --- in the transfer thread ----------------------------------------------------------------------------------

    def _make(self) -> TransferThread:
        rank = self._rank
        transport = transport_factory(rank.connector, rank.key)(self._agent, rank.placement.host)
        transport.register(self._memory.region)
        self._endpoint.set_result(transport.describe())
        try:
            engine, open_socket = self._engine.result(PEERS_SECONDS)
        except TimeoutError:
            raise StartError("the other ranks did not publish their memory") from None
        if len(engine.ranks) > 1:
            _warm_up(transport, engine.ranks[(self._number + 1) % len(engine.ranks)].endpoint)
        layouts = [each.layout for each in engine.ranks]
        return TransferThread(self._number, layouts, transport, open_socket(), self._memory.checksums)

    def _failed(self, error: BaseException) -> None:
        """The last act of the thread."""
        if not self._endpoint.done():
            self._endpoint.set_exception(error)
            return
        if isinstance(error, RankLost):
            time.sleep(STUCK_SECONDS)  # this rank's step loop, if it does not hang, hears of it too and ends by itself
            self._end_process(error)
        if isinstance(error, EngineFailed):  # on the leader, which tells more
            self._end_process(RankLost(str(error)))
        why = str(error) or type(error).__name__
        self._end_process(EngineFailed(f"the transfer thread of rank {self._number} died: {why}"))


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
