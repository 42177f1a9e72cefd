"""A worker's transfer thread. It listens, and the leader connects: under vLLM the leader comes after its workers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import zmq

from tandem.errors import StartError, TransferError
from tandem.kv.layout import KvLayout
from tandem.transfer.thread.transfer_thread import LEADER_EVENTS, TransferThread, start_transfer_thread
from tandem.transfer.transports.base import RankEndpoint, Region, TransportFactory
from tandem.wire.keys import ClusterKey
from tandem.wire.messages import Address
from tandem.wire.sockets import SocketOptions, Sockets

log = logging.getLogger(__name__)

T = TypeVar("T")

START_SECONDS = 60.0
LEADER_SECONDS = 600.0
"""The leader connects once all workers are ready, which may be long after this one is."""
SEND_MS = 20_000
"""A report that nobody takes for so long means that the leader is gone."""


@dataclass(frozen=True, slots=True)
class RankAgent:
    """Names a rank's agent, and the address of its node."""

    rank: int
    name: str
    host: str


class RankTransfer:
    """Starts the thread in two steps: before and after the ranks know of each other's memory.

    Attributes:
        failed: why the thread has ended, if it has.
    """

    def __init__(self, agent: RankAgent, make: TransportFactory, region: Region) -> None:
        self._agent = agent
        self._make = make
        self._region = region
        self._endpoint: Future[RankEndpoint] = Future()
        self._ranks: Future[tuple[list[KvLayout], ClusterKey]] = Future()
        self._address: Future[Address] = Future()
        self.failed: BaseException | None = None
        start_transfer_thread(self._start, f"transfer-{agent.rank}", self._on_failure)

    def endpoint(self) -> RankEndpoint:
        """Return the address under which peers reach this rank's memory. Raises what the transport raised."""
        return _result(self._endpoint, "the transport did not start")

    def listen(self, layouts: Sequence[KvLayout], key: ClusterKey) -> Address:
        """Let the thread serve the leader of these ranks, which holds the key. Return where it listens."""
        self._ranks.set_result((list(layouts), key))
        return _result(self._address, "the transfer thread does not listen")

    # --- in the thread -------------------------------------------------------------------------------------------

    def _start(self) -> TransferThread:
        agent = self._agent
        transport = self._make(agent.name, agent.host)
        transport.register(self._region)
        self._endpoint.set_result(transport.describe())
        layouts, key = _result(self._ranks, "the other ranks did not publish their memory")
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        options = SocketOptions(identity=b"%d" % agent.rank, patient=True, monitor=LEADER_EVENTS)
        socket, port = Sockets(context, key).bind(zmq.DEALER, agent.host, 0, options)
        socket.set(zmq.SNDTIMEO, SEND_MS)
        self._address.set_result(Address(agent.host, port))
        if not socket.poll(int(LEADER_SECONDS * 1000), zmq.POLLOUT):
            raise TransferError("the scheduler side did not connect")
        return TransferThread(agent.rank, layouts, transport, socket, listens=True)

    def _on_failure(self, error: BaseException) -> None:
        self.failed = error
        for future in (self._endpoint, self._address):
            if not future.done():
                future.set_exception(error)
        log.error("transfer thread of rank %d: %s", self._agent.rank, error)


def _result(future: Future[T], problem: str) -> T:
    try:
        return future.result(START_SECONDS)
    except TimeoutError:
        raise StartError(f"{problem} in {START_SECONDS:.0f} s") from None
