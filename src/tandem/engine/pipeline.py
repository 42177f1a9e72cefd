"""How a batch reaches all ranks of an engine and its result comes back."""

from __future__ import annotations

import logging
from collections import deque

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from tandem.engine.runner import Runner
from tandem.errors import EngineFailed
from tandem.scheduling.batch import Batch, StepResult

log = logging.getLogger(__name__)


class Halt(msgspec.Struct, frozen=True, array_like=True, tag="halt"):
    """The engine ends."""


class Here(msgspec.Struct, frozen=True, array_like=True, tag="here"):
    """First message of a follower."""


class SoloPipeline:
    """An engine of one rank: no hop to anywhere."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._results: deque[StepResult] = deque()

    def submit(self, batch: Batch) -> None:
        result = self._runner.run(batch)
        assert result is not None
        self._results.append(result)

    def results(self) -> list[StepResult]:
        done = list(self._results)
        self._results.clear()
        return done

    def fileno(self) -> int | None:
        return None

    def close(self) -> None:
        pass


class LeaderPipeline:
    """The leader's side for an engine of several ranks.

    Args:
        socket: ROUTER to which every other rank connects with its rank as identity.
    """

    def __init__(self, runner: Runner, socket: zmq.Socket[bytes], ranks: int) -> None:
        self._runner = runner
        self._socket = socket
        self._followers = [b"%d" % rank for rank in range(1, ranks)]
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(StepResult | Here)
        self._results: deque[StepResult] = deque()
        self._monitor = socket.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self._connections: set[int] = set()

    def wait_for_followers(self) -> None:
        """Returns when all are connected. They come from the collective that told them the address."""
        missing = set(self._followers)
        while missing:
            if not self._socket.poll(30_000):
                raise EngineFailed(f"ranks {sorted(int(m) for m in missing)} did not connect to the leader")
            rank, message = self._receive()
            if isinstance(message, Here):
                missing.discard(rank)
        self._lost_connection(counting=True)

    def _lost_connection(self, *, counting: bool = False) -> bool:
        """Whether a connection has ended that was there when all followers were; strangers who knock do not count."""
        lost = False
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)
            file_descriptor = event["value"]
            if event["event"] == zmq.EVENT_DISCONNECTED and file_descriptor in self._connections:
                self._connections.discard(file_descriptor)
                lost = True
            elif event["event"] == zmq.EVENT_ACCEPTED and counting:
                self._connections.add(file_descriptor)
        return lost

    def _receive(self) -> tuple[bytes, StepResult | Here | None]:
        """The next message and who sent it; None for what is no message of a rank of this engine."""
        sender, *rest = self._socket.recv_multipart()
        try:
            if sender in self._followers:
                return sender, self._decoder.decode(b"".join(rest))
        except msgspec.DecodeError as error:
            log.warning("a message of rank %s was dropped: %s", sender, error)
        return sender, None

    def submit(self, batch: Batch) -> None:
        self._broadcast(self._encoder.encode(batch))
        result = self._runner.run(batch)
        if result is not None:
            self._results.append(result)

    def results(self) -> list[StepResult]:
        if self._lost_connection():
            raise EngineFailed("a rank of this engine was lost")
        while self._socket.poll(0):
            _, message = self._receive()
            if isinstance(message, StepResult):
                self._results.append(message)
        done = list(self._results)
        self._results.clear()
        return done

    def fileno(self) -> int | None:
        return int(self._socket.get(zmq.FD))

    def close(self) -> None:
        self._broadcast(self._encoder.encode(Halt()))
        self._socket.disable_monitor()
        self._socket.close(linger=500)

    def _broadcast(self, data: bytes) -> None:
        for follower in self._followers:
            self._socket.send_multipart([follower, data])


class Follower:
    """The step loop of every rank but the leader's.

    Args:
        socket: DEALER connected to the leader.
    """

    def __init__(self, runner: Runner, socket: zmq.Socket[bytes]) -> None:
        self._runner = runner
        self._socket = socket
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Batch | Halt)

    def run(self) -> str:
        """Until the leader halts or is lost; returns which."""
        monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(monitor, zmq.POLLIN)
        self._socket.send(self._encoder.encode(Here()))
        while True:
            ready = dict(poller.poll())
            if self._socket in ready:
                message = self._decoder.decode(self._socket.recv())
                if isinstance(message, Halt):
                    return "the leader has stopped"
                result = self._runner.run(message)
                if result is not None:
                    self._socket.send(self._encoder.encode(result))
            elif monitor in ready:
                raise EngineFailed("the leader of this engine was lost")
