"""A rank's transfer thread: it alone owns the transport and turns orders into reads."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from tandem.errors import EngineFailed, PeerLost, RankLost, TransferError, WireError
from tandem.kv.layout import KvLayout, LayoutError
from tandem.transfer.thread.thread_messages import (
    ClosePeer,
    FromTransferThread,
    LeaderAlive,
    OpenPeer,
    PeerOpened,
    ReadEnded,
    ReadOrder,
    ReadQuiet,
    StopThread,
    ThreadAlive,
    ToTransferThread,
)
from tandem.transfer.thread.verification import PeerReads, Verification, Verifier
from tandem.transfer.transports.base import Read, ReadState, Transport
from tandem.wire.codec import Codec
from tandem.wire.fields import clip
from tandem.wire.silence import Silence

log = logging.getLogger(__name__)

POLL_BUSY_MS = 1
POLL_IDLE_MS = 500
SPIN_SECONDS = 0.002
BEAT_SECONDS = 1.0
SILENCE_SECONDS = 20.0
"""The leader beats once a second, also while it computes."""

LEADER_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
"""The events of the connection to its leader that a transfer thread watches, from before it is made."""


@dataclass(slots=True)
class _Job:
    order: ReadOrder
    started: float
    reads: list[Read] = field(default_factory=list)
    bytes: int = 0
    descriptors: int = 0
    error: str | None = None
    peer_lost: bool = False
    corrupt: bool = False
    verification: Verification | None = None
    reported: bool = False

    def any(self, state: ReadState) -> bool:
        return any(read.state is state for read in self.reads)


class TransferThread:
    """Everything in here is touched by its own thread only.

    Args:
        rank: this rank in its engine, which also spreads readers over replicas.
        layouts: of the KV memory of all ranks of this engine; `transport` has registered this rank's.
        socket: connected to the leader, if it is in another process monitored for LEADER_EVENTS; orders in, reports
            out.
        verifier: of this rank's KV memory; None if reads are not verified.
        listens: the leader connects to `socket`, and so may others, whose hanging up means nothing.
    """

    def __init__(
        self,
        rank: int,
        layouts: Sequence[KvLayout],
        transport: Transport,
        socket: zmq.Socket[bytes],
        verifier: Verifier | None = None,
        *,
        listens: bool = False,
    ) -> None:
        self._rank = rank
        self._layouts = layouts
        self._transport = transport
        self._socket = socket
        self._verifier = verifier
        self._monitor = socket.get_monitor_socket(LEADER_EVENTS)
        self._connected = False
        self._listens = listens
        self._leader: int | None = None  # file descriptor of its connection to a listener, once it has said anything
        self._codec: Codec[ToTransferThread] = Codec(ToTransferThread)
        self._peers: dict[int, PeerReads] = {}
        self._jobs: dict[int, _Job] = {}
        self._running = True
        self._answered = False
        self._silence: Silence[str] = Silence(SILENCE_SECONDS, POLL_IDLE_MS / 1000)
        self._last_post = 0.0
        self._beaten = 0.0

    def run(self) -> None:
        """Serve orders until `StopThread` comes. Raise EngineFailed if the engine has failed or the leader is lost."""
        poller, watched = zmq.Poller(), None
        try:
            while self._running:
                self._beat(time.monotonic())
                handles = list(self._transport.wait_on())
                if handles != watched:
                    poller, watched = _poller([self._socket, self._monitor, *handles]), handles
                poller.poll(self._wait_ms())
                self.step()
                if self._running and (self._leader_is_lost() or self._silence.look(time.monotonic())):
                    raise RankLost("the leader of this engine was lost")
        finally:
            self._transport.close()
            self._socket.disable_monitor()
            self._socket.close(linger=0)

    def step(self) -> None:
        """Do once what there is to do, without waiting."""
        self._take_orders()
        self._transport.poll()
        self._finish_jobs()

    def _leader_is_lost(self) -> bool:
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)
            leaders = event["value"] == self._leader if self._listens else self._connected
            if event["event"] == zmq.EVENT_DISCONNECTED and leaders:
                return True
            self._connected |= event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED
        return False

    def _beat(self, now: float) -> None:
        """Report that this rank is alive: until the leader has sent something, then once in BEAT_SECONDS."""
        if not self._answered or now - self._beaten > BEAT_SECONDS:
            self._beaten = now
            self._report(ThreadAlive(self._rank))

    def _wait_ms(self) -> int:
        """Spin right after a read was posted: small reads take less than a poll interval."""
        if all(job.reported for job in self._jobs.values()):
            return POLL_IDLE_MS
        return 0 if time.monotonic() - self._last_post < SPIN_SECONDS else POLL_BUSY_MS

    def _report(self, message: FromTransferThread) -> None:
        self._socket.send(self._codec.encode(message))

    def _take_orders(self) -> None:
        while True:
            try:
                data = self._receive()
            except zmq.Again:
                return
            self._answered = True
            self._silence.heard("leader", time.monotonic())
            try:
                message = self._codec.decode(data)
            except WireError as error:
                log.error("rank %d: order dropped: %s", self._rank, error)
                continue
            self._handle(message)

    def _receive(self) -> bytes:
        if not self._listens:
            return self._socket.recv(zmq.NOBLOCK)
        frame = self._socket.recv(zmq.NOBLOCK, copy=False)
        self._leader = int(frame.get(zmq.SRCFD))
        return frame.bytes

    def _handle(self, message: ToTransferThread) -> None:
        match message:
            case LeaderAlive():
                pass  # that it came is all that it says
            case OpenPeer():
                self._open(message)
            case ClosePeer(session=session):
                self._close(session)
            case ReadOrder():
                self._start(message)
            case StopThread(failed=None):
                self._running = False
            case StopThread(failed=failed):
                raise EngineFailed(f"the engine has failed: {failed}")

    def _open(self, message: OpenPeer) -> None:
        error = None
        try:
            for source in message.sources:
                self._transport.connect(source.endpoint)
            self._peers[message.session] = PeerReads.of(message.sources, self._layouts, self._rank, self._verifier)
        except Exception as problem:  # whatever a peer says of itself must not end this thread
            _log_bug(f"session {message.session} cannot be opened", problem)
            error = str(problem) or type(problem).__name__
            self._disconnect([source.endpoint.agent for source in message.sources])
        self._report(PeerOpened(self._rank, message.session, error and clip(error)))

    def _close(self, session: int) -> None:
        peer = self._peers.pop(session, None)
        self._disconnect(peer.agents if peer else [])

    def _disconnect(self, agents: Sequence[str]) -> None:
        """Disconnect from those that no other session needs: an engine that is known by two addresses has two."""
        used = {agent for peer in self._peers.values() for agent in peer.agents}
        for agent in agents:
            if agent not in used:
                self._transport.disconnect(agent)

    def _start(self, order: ReadOrder) -> None:
        job = self._jobs[order.job] = _Job(order, time.monotonic())
        peer = self._peers.get(order.session)
        if peer is None:
            job.error = f"the peer of session {order.session} is not connected"
            return
        try:
            for agent, runs in peer.runs(order):
                job.reads.append(self._transport.post(agent, runs))
                job.bytes += runs.nbytes
                job.descriptors += len(runs)
        except Exception as problem:
            _log_bug(f"job {order.job} cannot be started", problem)
            job.error = str(problem) or type(problem).__name__
            job.peer_lost = isinstance(problem, PeerLost)
        self._last_post = time.monotonic()

    def _finish_jobs(self) -> None:
        """Report the jobs of which no read is in progress; keep those of which bytes may still arrive."""
        for number, job in list(self._jobs.items()):
            if job.any(ReadState.IN_PROGRESS):
                continue
            if self._verifier is not None and not self._verified(job, self._verifier):
                continue
            may_still_write = job.any(ReadState.FAILING)
            if not may_still_write:
                del self._jobs[number]
            if not job.reported:
                self._report(self._ended(number, job, may_still_write))
                job.reported = True
            elif not may_still_write:
                self._report(ReadQuiet(self._rank, number))

    def _verified(self, job: _Job, verifier: Verifier) -> bool:
        """Verify some of what came. Return whether that is all, or nothing good came."""
        if job.error is not None or any(read.state is not ReadState.DONE for read in job.reads):
            return True
        if job.verification is None:
            job.verification = Verification(job.order, verifier)
        if not job.verification.ended:
            job.error = job.verification.go_on()
            job.corrupt = job.error is not None
        if job.corrupt:
            log.error("rank %d: %s", self._rank, job.error)
        return job.verification.ended

    def _ended(self, number: int, job: _Job, may_still_write: bool) -> ReadEnded:
        failed = next((read.error or "read failed" for read in job.reads if read.state is not ReadState.DONE), None)
        error, lost = job.error or failed, job.peer_lost or failed is not None
        seconds = time.monotonic() - job.started
        return ReadEnded(
            self._rank,
            number,
            job.bytes,
            job.descriptors,
            seconds,
            error and clip(error),
            lost,
            may_still_write,
            job.corrupt,
        )


def _log_bug(what: str, error: Exception) -> None:
    if not isinstance(error, TransferError | LayoutError):
        log.error("%s", what, exc_info=error)


def _poller(handles: list[Any]) -> zmq.Poller:
    poller = zmq.Poller()
    for handle in handles:
        poller.register(handle, zmq.POLLIN)
    return poller


def start_transfer_thread(
    make: Callable[[], TransferThread], name: str, on_failure: Callable[[BaseException], None]
) -> threading.Thread:
    """Start a thread that makes and runs a `TransferThread`: it owns the sockets and the transport that it makes.

    `on_failure` is called in that thread if it dies; an engine cannot go on without it.
    """

    def body() -> None:
        try:
            make().run()
        except EngineFailed as error:
            on_failure(error)
        except BaseException as error:
            log.exception("%s: the transfer thread died", name)
            on_failure(error)

    thread = threading.Thread(target=body, name=name, daemon=True)
    thread.start()
    return thread
