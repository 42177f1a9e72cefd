"""Transports in processes of their own, driven by tests."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import zmq
from numpy.typing import NDArray

from tandem.kv.runs import Runs
from tandem.transfer.transports.base import RankEndpoint, Read, ReadState, Region, Transport
from tandem.transfer.transports.registry import transport_factory

SECONDS = 30.0

# name -> connector and what its environment must be. NIXL has two very different ways: within a host it copies by
# system call in the reader, over tcp the serving process takes part.
KINDS: dict[str, tuple[str, dict[str, str]]] = {
    "nixl": ("nixl", {}),
    "nixl-over-tcp": ("nixl", {"UCX_TLS": "tcp"}),
    "tcp": ("tcp", {}),
}


class Memory:
    """Host memory of a seeded pattern, or zeros for seed 0."""

    def __init__(self, size: int, seed: int = 0) -> None:
        self.bytes = np.zeros(size, dtype=np.uint8)
        self.fill(seed)
        self.region = Region(self.bytes.ctypes.data, size)

    def fill(self, seed: int) -> None:
        self.bytes[:] = pattern(len(self.bytes), seed)


def pattern(size: int, seed: int) -> NDArray[np.uint8]:
    if seed == 0:
        return np.zeros(size, dtype=np.uint8)
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def make_transport(kind: str, memory: Memory, agent: str | None = None) -> Transport:
    connector, environment = KINDS[kind]
    os.environ.update(environment)
    try:
        transport = transport_factory(connector, None)(agent or f"agent-{uuid.uuid4().hex}", "127.0.0.1")
    finally:
        for name in environment:
            del os.environ[name]
    transport.register(memory.region)
    return transport


def runs(*triples: tuple[int, int, int]) -> Runs:
    """Make runs of (source, destination, length) triples."""
    return Runs(*np.array(triples, dtype=np.int64).reshape(-1, 3).T)


def poll_until(condition: Callable[[], bool], *transports: Transport, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds} seconds")
        poll_once(*transports)


def poll_once(*transports: Transport) -> None:
    poller = zmq.Poller()
    for transport in transports:
        for handle in transport.wait_on():
            poller.register(handle, zmq.POLLIN)
    poller.poll(1)
    for transport in transports:
        transport.poll()


def ended(read: Read) -> bool:
    return read.state in (ReadState.DONE, ReadState.FAILED)


def _context() -> Any:
    """Importing nixl takes seconds; the fork server does it once for all peers."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nixl", "tests.transfer.transports.peer_process"])
    return context


def _thread_state(task: Path) -> str:
    return (task / "stat").read_text().rpartition(")")[2].split()[0]


class PeerProcess:
    """A transport in another process, serving memory of a pattern."""

    def __init__(self, kind: str, size: int, seed: int, agent: str | None = None) -> None:
        context = _context()
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, kind, size, seed, agent), daemon=True)
        self._process.start()
        theirs.close()
        self.endpoint: RankEndpoint = self._answer()

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def ask(self, command: str, *arguments: Any) -> Any:
        self._pipe.send((command, *arguments))
        return self._answer()

    def start(self, command: str, *arguments: Any) -> Callable[[], Any]:
        """Ask, and get the answer by calling what is returned."""
        self._pipe.send((command, *arguments))
        return self._answer

    def has_answer(self) -> bool:
        return bool(self._pipe.poll())

    def stop(self) -> None:
        """SIGSTOP; returns once every thread of the process has stopped."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGSTOP)
        tasks = Path(f"/proc/{self._process.pid}/task")
        while any(_thread_state(task) != "T" for task in tasks.iterdir()):
            os.sched_yield()

    def go_on(self) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.join(SECONDS)
        self._pipe.close()

    def _answer(self) -> Any:
        if not self._pipe.poll(SECONDS):
            raise TimeoutError("the peer process does not answer")
        return self._pipe.recv()


def _serve(pipe: Connection, kind: str, size: int, seed: int, agent: str | None) -> None:
    memory = Memory(size, seed)
    transport = make_transport(kind, memory, agent)
    pipe.send(transport.describe())
    while True:
        poller = zmq.Poller()
        poller.register(pipe.fileno(), zmq.POLLIN)
        for handle in transport.wait_on():
            poller.register(handle, zmq.POLLIN)
        poller.poll(100)
        transport.poll()
        if pipe.poll():
            try:
                command, *arguments = pipe.recv()
            except EOFError:
                return
            pipe.send(_answer_to(command, arguments, transport, memory))


def _answer_to(command: str, arguments: list[Any], transport: Transport, memory: Memory) -> Any:
    match command, arguments:
        case "ping", []:
            return "alive"
        case "fill", [number]:
            memory.fill(number)
            return None
        case "bytes", [start, stop]:
            return memory.bytes[start:stop].tobytes()
        case "read", [endpoint, triples]:
            transport.connect(endpoint)
            read = transport.post(endpoint.agent, runs(*triples))
            poll_until(lambda: ended(read), transport)
            return read.state, read.error
    raise ValueError(command)
