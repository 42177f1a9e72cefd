"""Brings a batch to all ranks of an engine and its result back to the leader."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from typing import Protocol

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from tandem.engine.step.masks import MaskMaker
from tandem.engine.step.runner import Runner
from tandem.engine.step.step_message import Masks, Step, StepEncoder
from tandem.engine.timeouts import CAUSE_SECONDS, FOLLOWERS_SECONDS, HALT_SECONDS
from tandem.errors import EngineFailed, RankLost
from tandem.scheduling.batch import Batch, Mask, StepResult
from tandem.wire.sockets import SocketOptions

log = logging.getLogger(__name__)

# Monitored from before the first connection, as a connection that nobody saw begin could be lost unseen.
LEADER_SOCKET = SocketOptions(handover=True, patient=True, monitor=zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)


def follower_socket(rank: int) -> SocketOptions:
    """Return the options of a follower's socket.

    The leader was listening before it told its address: where a connection fails, the leader is lost.
    """
    return SocketOptions(
        identity=b"%d" % rank, patient=True, monitor=zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED
    )


class Halt(msgspec.Struct, frozen=True, array_like=True, tag="halt"):
    """The engine ends. `failed`: not because somebody asked for it."""

    reason: str
    failed: bool


class Here(msgspec.Struct, frozen=True, array_like=True, tag="here"):
    """First message of a follower."""


class Pipeline(Protocol):
    """Runs batches on all ranks of the engine, in order."""

    def submit(self, batch: Batch) -> None:
        """Start a batch; returns when this rank's part is done."""

    def results(self) -> list[StepResult]:
        """Batches that are done, in order, without waiting."""

    def fileno(self) -> int | None:
        """Readable when a result may be there; None if results are there as soon as `submit` returns."""


class SoloPipeline:
    """An engine of one rank: no hop to anywhere.

    Args:
        steps: makes steps for the rank.
    """

    def __init__(self, runner: Runner, steps: StepEncoder, masks: MaskMaker) -> None:
        self._runner = runner
        self._steps = steps
        self._masks = masks
        self._results: list[StepResult] = []

    def wait_for_followers(self) -> None:
        """Return at once: there are none."""

    def submit(self, batch: Batch) -> None:
        result = self._runner.run(self._steps.step(batch), functools.partial(self._masks.take, batch.batch_id))
        if result is not None:
            self._results.append(result)

    def results(self) -> list[StepResult]:
        done, self._results = self._results, []
        return done

    def fileno(self) -> int | None:
        return None

    def close(self, reason: str, *, failed: bool) -> None:
        pass


class LeaderPipeline:
    """The leader's side for an engine of several ranks.

    Args:
        steps: makes steps for all ranks, this one too.
        socket: bound with LEADER_SOCKET; every other rank connects to it with its rank as identity.
        sampler: the rank that samples.
    """

    def __init__(
        self,
        runner: Runner,
        steps: StepEncoder,
        socket: zmq.Socket[bytes],
        ranks: int,
        masks: MaskMaker,
        sampler: int,
    ) -> None:
        self._runner = runner
        self._steps = steps
        self._masks = masks
        self._sampler = b"%d" % sampler
        self._socket = socket
        self._followers = [b"%d" % rank for rank in range(1, ranks)]
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(StepResult | Here)
        self._results: list[StepResult] = []
        self._monitor = socket.get_monitor_socket()
        self._open: set[int] = set()
        self._connections: dict[int, bytes] = {}

    def wait_for_followers(self) -> None:
        """Return when all are connected. They come from the collective that told them the address.

        Raises EngineFailed when one does not come, RankLost when one is lost meanwhile.
        """
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        deadline = time.monotonic() + FOLLOWERS_SECONDS
        while missing := set(self._followers) - set(self._connections.values()):
            poller.poll(int(1000 * max(0.0, deadline - time.monotonic())))
            if time.monotonic() > deadline:
                raise EngineFailed(f"ranks {sorted(int(m) for m in missing)} did not connect to the leader")
            if self._socket.poll(0):
                self._receive()
            self._check_connections()

    def _check_connections(self) -> None:
        """Raise RankLost if a rank's connection has ended; those of strangers do not count."""
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)
            connection = event["value"]
            if event["event"] == zmq.EVENT_ACCEPTED:
                self._open.add(connection)
                continue
            self._open.discard(connection)
            if (rank := self._connections.pop(connection, None)) is not None:
                raise _lost(rank)

    def _receive(self) -> StepResult | None:
        """Receive a message; return it if it is a result."""
        sender, *rest = self._socket.recv_multipart(copy=False)
        rank = sender.bytes
        if rank not in self._followers:
            return None
        try:
            message = self._decoder.decode(b"".join(frame.buffer for frame in rest))
        except msgspec.DecodeError as error:
            log.warning("a message of rank %s was dropped: %s", rank.decode(), error)
            return None
        if isinstance(message, StepResult):
            return message
        self._check_connections()
        connection = int(rest[0].get(zmq.SRCFD))
        if connection not in self._open:
            raise _lost(rank)
        self._connections[connection] = rank
        return None

    def submit(self, batch: Batch) -> None:
        step = self._steps.step(batch)
        self._broadcast(self._encoder.encode(step))
        try:
            result = self._runner.run(step, functools.partial(self._masks.take, batch.batch_id))
        except EngineFailed:
            # A collective with a rank that has just gone; word of which one may be on its way.
            if self._monitor.poll(int(1000 * CAUSE_SECONDS)):
                self._check_connections()
            raise
        if result is not None:
            self._results.append(result)
        elif self._sampler in self._followers and _constrained(batch):
            masks = Masks(batch.batch_id, self._masks.take(batch.batch_id))
            self._socket.send_multipart([self._sampler, self._encoder.encode(masks)])

    def results(self) -> list[StepResult]:
        self._check_connections()
        while self._socket.poll(0):
            if (result := self._receive()) is not None:
                self._results.append(result)
        done, self._results = self._results, []
        return done

    def fileno(self) -> int | None:
        return int(self._socket.get(zmq.FD))

    def close(self, reason: str, *, failed: bool) -> None:
        """Tell the followers why the engine ends. Returns once they have gone; bounded."""
        self._broadcast(self._encoder.encode(Halt(reason, failed)))
        deadline = time.monotonic() + HALT_SECONDS
        while self._connections and self._monitor.poll(max(0, int(1000 * (deadline - time.monotonic())))):
            with contextlib.suppress(EngineFailed):
                self._check_connections()
        self._socket.disable_monitor()
        self._socket.close(linger=500)

    def _broadcast(self, data: bytes) -> None:
        for follower in self._followers:
            self._socket.send_multipart([follower, data])


def _constrained(batch: Batch) -> bool:
    return any(row.sample is not None and row.sample.constrained for row in batch.rows)


def _lost(rank: bytes) -> RankLost:
    return RankLost(f"rank {rank.decode()} of this engine was lost")


class Follower:
    """The loop of every rank but the leader's: take a step, compute, and answer if this rank samples.

    Args:
        socket: DEALER connected to the leader with `follower_socket`.
    """

    def __init__(self, runner: Runner, socket: zmq.Socket[bytes]) -> None:
        self._runner = runner
        self._socket = socket
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Step | Masks | Halt)

    def run(self) -> str:
        """Serve until the leader halts; return why. Raises RankLost when the engine failed, or the leader is lost."""
        monitor = self._socket.get_monitor_socket()
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(monitor, zmq.POLLIN)
        self._socket.send(self._encoder.encode(Here()))
        while True:
            ready = dict(poller.poll())
            if self._socket in ready:
                message = self._decoder.decode(self._socket.recv())
                if isinstance(message, Halt):
                    if message.failed:
                        raise RankLost(message.reason)
                    return message.reason
                if isinstance(message, Masks):  # of a batch whose constrained rows all failed before they were sampled
                    continue
                try:
                    result = self._runner.run(message, functools.partial(self._take_masks, message.batch_id, poller))
                except EngineFailed:
                    self._explain()
                    raise
                if result is not None:
                    self._socket.send(self._encoder.encode(result))
            elif monitor in ready:
                raise RankLost("the leader of this engine was lost")

    def _take_masks(self, batch_id: int, poller: zmq.Poller) -> dict[str, Mask]:
        """Return the masks of a batch, which the leader sends after it. Raises RankLost."""
        while True:
            if self._socket not in dict(poller.poll()):
                raise RankLost("the leader of this engine was lost")
            message = self._decoder.decode(self._socket.recv())
            if isinstance(message, Halt):
                raise RankLost(message.reason)
            if isinstance(message, Masks) and message.batch_id == batch_id:
                return message.masks

    def _explain(self) -> None:
        """Raise RankLost with what the leader has to say about a collective that failed, if it says anything."""
        deadline = time.monotonic() + CAUSE_SECONDS
        while (left := deadline - time.monotonic()) > 0 and self._socket.poll(int(1000 * left)):
            message = self._decoder.decode(self._socket.recv())
            if isinstance(message, Halt):
                raise RankLost(message.reason)
