"""The scheduler side's thread: prefill listener, decode sessions and the workers' transfer threads in one event loop.

It has no step loop: vLLM's scheduler, in the engine core's main thread, gives it work by `call` and takes what has
happened from `events`. Nothing else is shared between the two.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import zmq
import zmq.asyncio

from tandem import __version__
from tandem.errors import StartError, TransferError
from tandem.ids import EngineIdentity
from tandem.transfer.decode.dialer import PeerDialer, PullEvents
from tandem.transfer.handshake import PROTOCOL, EngineDescriptor
from tandem.transfer.prefill.listener import MAX_PEER_MESSAGE, MAX_PEER_MESSAGES, PeerListener
from tandem.transfer.thread.leader_side import TransferThreads
from tandem.vllm.messages import RankHandshake
from tandem.vllm.options import ConnectorOptions
from tandem.wire.addresses import endpoint
from tandem.wire.keys import ClusterKey, load_key
from tandem.wire.messages import Address
from tandem.wire.peer_messages import Envelope
from tandem.wire.sockets import SocketOptions, Sockets

log = logging.getLogger(__name__)

READY_SECONDS = 60.0
STOP_SECONDS = 5.0


# --- what the scheduler hears of -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OffersEnded:
    """The arena blocks of these exported requests may be used again.

    Attributes:
        expired: readers so far that had claimed KV here and then fell silent.
    """

    request_ids: list[str]
    expired: int


@dataclass(frozen=True, slots=True)
class PullArrived:
    """All KV of a request is in its arena blocks."""

    request_id: str
    bytes: int
    descriptors: int
    seconds: float


@dataclass(frozen=True, slots=True)
class PullFailed:
    """The KV of a request does not come. `PullQuiet` follows."""

    request_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class PullQuiet:
    """No byte arrives any more in the arena blocks of a request that failed or was given up."""

    request_id: str


LeaderEvent = OffersEnded | PullArrived | PullFailed | PullQuiet


class Leader:
    """Serves peers from its start to `stop`.

    Args:
        ranks: of this engine, by rank.
        fingerprint: of the model.
        dtype: of the KV.
        max_published: arena blocks that KV may hold which nobody has claimed yet.

    Attributes:
        events: of LeaderEvent, for the scheduler's thread.
        address: at which decode engines reach this engine.
        listener, dialer: touched by this thread alone; `call` runs what touches them.

    Raises:
        ConfigError: the host or port cannot be bound.
    """

    def __init__(
        self,
        options: ConnectorOptions,
        ranks: Sequence[RankHandshake],
        fingerprint: str,
        dtype: str,
        connector: str,
        max_published: int,
    ) -> None:
        self.events: queue.SimpleQueue[LeaderEvent] = queue.SimpleQueue()
        self.identity: EngineIdentity = ranks[0].identity
        descriptors = [rank.descriptor for rank in ranks]
        descriptor = EngineDescriptor(self.identity, descriptors[0].layout.block_size, descriptors)
        descriptor.check()
        envelope = Envelope(PROTOCOL, fingerprint, dtype, connector, f"tandem {__version__} under vLLM")
        self._loop = asyncio.new_event_loop()
        self._stopping: asyncio.Future[None] = self._loop.create_future()
        self._ready = threading.Event()
        self._failed: BaseException | None = None
        context = zmq.asyncio.Context()
        self._transfer_socket = _connect_to_workers(context, ranks)
        self._transfer_threads = TransferThreads(self._transfer_socket, len(ranks))
        peers: Sockets[zmq.asyncio.Socket] = Sockets(context, load_key(options.access.cluster_key_file))
        socket_options = SocketOptions(handover=True, max_message=MAX_PEER_MESSAGE, hwm=MAX_PEER_MESSAGES)
        socket, port = peers.bind(zmq.ROUTER, options.host, options.port, socket_options)
        self.address = Address(options.host, port)
        layouts = [each.layout for each in descriptors]
        self.dialer = PeerDialer(
            self.identity, envelope, layouts, self._transfer_threads, peers, _pull_events(self.events.put)
        )
        self.listener = PeerListener(
            socket,
            self.identity,
            envelope,
            descriptor,
            options.lease_ttl,
            max_published,
            on_ended=lambda request_ids: self.events.put(OffersEnded(request_ids, self.listener.expired)),
            on_corrupt=lambda request_ids: None,  # nothing of the arena is ever found again
        )
        self._thread = threading.Thread(target=self._run, name="tandem-leader", daemon=True)

    def start(self) -> None:
        """Return once all workers' transfer threads are there. Raises StartError."""
        self._thread.start()
        if not self._ready.wait(READY_SECONDS):
            raise StartError(f"the workers' transfer threads were not ready in {READY_SECONDS:.0f} s")
        if self._failed is not None:
            raise StartError(f"the hand-off did not start: {self._failed}")

    def call(self, action: Callable[[], object]) -> None:
        """Run `action` in the thread, after what was given before. Raises TransferError if the thread has died."""
        self.check()
        self._loop.call_soon_threadsafe(action)

    def check(self) -> None:
        """Raise TransferError if the thread has died: nobody hears of any hand-off any more."""
        if self._failed is not None:
            raise TransferError(f"the hand-off of this engine has failed: {self._failed}")

    def stop(self) -> None:
        """End the thread and the workers' transfer threads; bounded, idempotent."""

        def ask() -> None:
            if not self._stopping.done():
                self._stopping.set_result(None)

        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(ask)
            self._thread.join(STOP_SECONDS)

    # --- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as error:
            self._failed = error
            log.exception("the hand-off has failed")
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        coroutines: list[Coroutine[Any, Any, None]] = [
            self._transfer_threads.run(self.dialer.reported),
            self._transfer_threads.watch(),
            self.listener.run(),
            self.dialer.run(),
            self._wait_for_workers(),
        ]
        tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
        try:
            waiting: set[asyncio.Future[None]] = {*tasks[:-1], self._stopping}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            self._transfer_threads.stop()
            self.dialer.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._transfer_socket.close(linger=500)

    async def _wait_for_workers(self) -> None:
        await self._transfer_threads.ready.wait()
        self._ready.set()


def _pull_events(put: Callable[[LeaderEvent], None]) -> PullEvents:
    return PullEvents(
        arrived=lambda pull: put(PullArrived(pull.request_id, pull.bytes, pull.descriptors, pull.read_seconds)),
        failed=lambda request_id, reason, _: put(PullFailed(request_id, reason)),
        quiet=lambda request_id: put(PullQuiet(request_id)),
    )


def _connect_to_workers(context: zmq.asyncio.Context, ranks: Sequence[RankHandshake]) -> zmq.asyncio.Socket:
    """Return a ROUTER that knows each worker by its rank, as the workers' sockets say it on being connected to."""
    sockets: Sockets[zmq.asyncio.Socket] = Sockets(context, ClusterKey(ranks[0].engine_key))
    first, *others = [rank.transfer for rank in ranks]
    socket = sockets.connect(zmq.ROUTER, first.host, first.port, SocketOptions(handover=True, patient=True))
    for address in others:
        socket.connect(f"tcp://{endpoint(address.host, address.port)}")
    return socket
