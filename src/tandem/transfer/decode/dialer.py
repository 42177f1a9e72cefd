"""Shakes hands with prefill engines, claims KV from them and has it read: the shell around `Pulls`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import zmq
import zmq.asyncio

from tandem.errors import ConfigError
from tandem.ids import EngineIdentity
from tandem.kv.layout import KvLayout
from tandem.transfer.decode.actions import Action, Connect, Disconnect, Order, PullArrived, PullFailed, PullQuiet, Send
from tandem.transfer.decode.pull import Pull
from tandem.transfer.decode.pulls import Pulls
from tandem.transfer.thread.leader_side import TransferThreads
from tandem.transfer.thread.thread_messages import FromTransferThread
from tandem.wire.codec import Codec
from tandem.wire.engine_status import PeerInfo
from tandem.wire.messages import Introduce, PullKv
from tandem.wire.peer_messages import Envelope, ToDecode
from tandem.wire.receiving import DroppedMessages, receive_messages
from tandem.wire.sockets import SocketOptions, Sockets

log = logging.getLogger(__name__)

MAX_MESSAGE = 32 * 1024 * 1024
MAX_MESSAGES = 256
"""Bytes in a message of a prefill engine (its description is the largest), and messages of each that may wait here."""

TICK = 0.1
"""Seconds between looks at the clock; a lease lasts at least ten of them."""


@dataclass(frozen=True, slots=True)
class PullEvents:
    """Callbacks into the engine, all in the event loop's thread.

    `arrived`: all KV is here. `failed`: it will not come, and why, and the first token if that is known. After
    either, nothing is said of the request but `quiet`, which follows `failed` and `PeerDialer.give_up`: no byte can
    arrive in its blocks any more.
    """

    arrived: Callable[[Pull], None]
    failed: Callable[[str, str, int | None], None]
    quiet: Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Connection:
    socket: zmq.asyncio.Socket
    receiving: asyncio.Task[None]


class PeerDialer:
    """One DEALER for each session. A connection that breaks, or breaks us, ends its session and nothing else.

    Args:
        layouts: of this engine's ranks, by rank.
        verify: its ranks check what they read against checksums.
    """

    def __init__(
        self,
        identity: EngineIdentity,
        envelope: Envelope,
        layouts: Sequence[KvLayout],
        transfer_threads: TransferThreads,
        sockets: Sockets[zmq.asyncio.Socket],
        events: PullEvents,
        *,
        verify: bool = False,
    ) -> None:
        self._identity = identity
        self._transfer_threads = transfer_threads
        self._sockets = sockets
        self._events = events
        self._codec: Codec[ToDecode] = Codec(ToDecode, MAX_MESSAGE)
        self._pulls = Pulls(identity, envelope, layouts, verify=verify)
        self._connections: dict[int, _Connection] = {}

    async def run(self) -> None:
        """Let time pass for the sessions, until cancelled."""
        try:
            while True:
                await asyncio.sleep(TICK)
                now = time.monotonic()
                for session in list(self._connections):
                    self._tick(session, now)
                self._pulls.forget_ended(now)
        finally:
            self.close()

    def close(self) -> None:
        """Close all connections. Idempotent."""
        for session in list(self._connections):
            self._disconnect(session)

    @property
    def peers(self) -> list[PeerInfo]:
        return self._pulls.peers

    @property
    def failures(self) -> int:
        """Pulls that failed so far."""
        return self._pulls.failures

    @property
    def corrupt(self) -> int:
        """Those of them whose bytes did not fit their checksums."""
        return self._pulls.corrupt

    # --- what the engine says ------------------------------------------------------------------------------------

    def introduce(self, message: Introduce) -> None:
        """Shake hands with these engines before a request waits for it; forget sessions with those that have left."""
        self._pulls.introduce(message, time.monotonic())
        self._act()

    def knows(self, request_id: str) -> bool:
        """Return whether the request's KV is awaited, or still being read."""
        return self._pulls.knows(request_id)

    def open(self, request_id: str, source: PullKv, prompt: str | None = None, tokens: int | None = None) -> None:
        """Claim a request's KV; `allocated` says later where it goes. `prompt`: digest of its `tokens` tokens."""
        self._pulls.open(request_id, source, prompt, time.monotonic(), tokens)
        self._act()

    def allocated(self, request_id: str, blocks: list[int], cached: int, wanted: int) -> None:
        """The KV goes into `blocks`. `wanted`: tokens of the prompt, of which the first `cached` are here already."""
        self._pulls.allocated(request_id, blocks, cached, wanted)
        self._act()

    def give_up(self, request_id: str, reason: str) -> None:
        """The request does not want its KV any more. `quiet` follows, at once or when its reads have ended."""
        self._pulls.give_up(request_id, reason)
        self._act()

    def reported(self, report: FromTransferThread) -> None:
        """A rank's transfer thread has reported."""
        self._pulls.reported(report, time.monotonic())
        self._act()

    # --- what peers and the clock say ------------------------------------------------------------------------------

    def _tick(self, session: int, now: float) -> None:
        try:
            self._pulls.tick(session, now)
        except Exception as error:
            self._failed(session, error)
        self._act()

    async def _receive(self, session: int, socket: zmq.asyncio.Socket, dropped: DroppedMessages) -> None:
        def handle(_: bytes, message: ToDecode) -> None:
            self._pulls.received(session, message, time.monotonic())
            self._act()

        try:
            await receive_messages(socket, self._codec, handle, dropped)
        except Exception as error:
            if session in self._connections:
                self._failed(session, error)
                self._act()

    def _unreadable(self, session: int, error: Exception) -> None:
        self._pulls.unreadable(session, error, time.monotonic())
        self._act()

    def _failed(self, session: int, error: Exception) -> None:
        log.error("session %d: the connection failed", session, exc_info=error)
        self._pulls.connection_failed(session, error, time.monotonic())

    # --- what is done about it -------------------------------------------------------------------------------------

    def _act(self) -> None:
        while actions := self._pulls.drain():
            for action in actions:
                try:
                    self._do(action)
                except Exception as error:
                    if not isinstance(action, Connect | Send):
                        raise
                    self._failed(action.session, error)

    def _do(self, action: Action) -> None:
        match action:
            case Connect():
                self._connect(action)
            case Disconnect(session=session):
                self._disconnect(session)
            case Send(session=session, message=message):
                if session in self._connections:
                    self._connections[session].socket.send(self._codec.encode(message))
            case Order(message=order, rank=rank):
                self._transfer_threads.order(order, rank)
            case PullArrived(pull=pull):
                self._events.arrived(pull)
            case PullFailed(request_id=request_id, reason=reason, first_token=first_token):
                self._events.failed(request_id, reason, first_token)
            case PullQuiet(request_id=request_id):
                self._events.quiet(request_id)

    def _connect(self, action: Connect) -> None:
        session, address = action.session, action.address
        # An identity of its own: leases are held under it, and must not pass from one session to the next.
        options = SocketOptions(MAX_MESSAGE, MAX_MESSAGES, identity=f"{self._identity.incarnation}/{session}".encode())
        try:
            socket = self._sockets.connect(zmq.DEALER, address.host, address.port, options)
        except (ConfigError, zmq.ZMQError) as error:
            self._pulls.connection_failed(session, error, time.monotonic())
            return
        dropped = _DroppedFromPeer(session, self._unreadable)
        receiving = asyncio.create_task(self._receive(session, socket, dropped), name=f"session {session}")
        self._connections[session] = _Connection(socket, receiving)

    def _disconnect(self, session: int) -> None:
        connection = self._connections.pop(session, None)
        if connection is not None:
            connection.receiving.cancel()
            connection.socket.close(linger=0)


class _DroppedFromPeer(DroppedMessages):
    """Also lets the session know: during its handshake, or by our own error, a message is not dropped without harm."""

    def __init__(self, session: int, on_dropped: Callable[[int, Exception], None]) -> None:
        super().__init__(log, f"session {session}:")
        self._session = session
        self._on_dropped = on_dropped

    def add(self, error: Exception) -> None:
        super().add(error)
        self._on_dropped(self._session, error)
