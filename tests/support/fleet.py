"""Engines of many shapes at once, and a router in the test's own process that takes any route it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import zmq
import zmq.asyncio

from tandem.api.backend import TokenDelta, TokenRequest
from tandem.config import (
    BatchSection,
    CacheSection,
    EngineConfig,
    ModelSection,
    NetworkSection,
    ParallelSection,
    RunSection,
    TimeSection,
)
from tandem.engine.start.launch import rank_main
from tandem.engine.start.placement import RankPlacement
from tandem.errors import RequestError
from tandem.model_folder import ModelFolder
from tandem.processes import ChildProcesses
from tandem.router.connection_monitor import CONTROL_SOCKET
from tandem.router.engine_connections import EngineConnections, Stalled, StreamQueue
from tandem.router.engine_registry import EngineEntry, EngineRegistry
from tandem.router.policy import ANY_PROMPT, NoRoute, Prompt, Route
from tandem.router.request_router import RequestRouter
from tandem.wire.engine_status import EngineStatus, PeerInfo
from tandem.wire.messages import Address, Generate, Introduce, PeerAddress, PromptScores, Tokens
from tandem.wire.sampling import SamplingParams
from tandem.wire.sockets import Sockets

T = TypeVar("T")

START_SECONDS = 240.0
ANSWER_SECONDS = 120.0


@dataclass(frozen=True)
class Shape:
    tp: int = 1
    pp: int = 1
    block_size: int = 16

    @property
    def name(self) -> str:
        parts = [f"tp{self.tp}"] if self.tp > 1 or self.pp == 1 else []
        parts += [f"pp{self.pp}"] if self.pp > 1 else []
        return "x".join(parts) + (f"-block{self.block_size}" if self.block_size != 16 else "")


class Fleet:
    """One engine of each shape; `answer` makes any of them prefill for any other.

    Args:
        main: what each rank's process runs.
    """

    def __init__(
        self,
        model: Path,
        shapes: Sequence[Shape],
        connector: str,
        *,
        kv_memory: int = 8 << 20,
        max_batched_tokens: int = 64,
        verify_kv: bool = False,
        main: Callable[..., None] = rank_main,
    ) -> None:
        self._verify_kv, self._main = verify_kv, main
        self._cache_bytes, self._batch_tokens = kv_memory, max_batched_tokens
        self._children = ChildProcesses()
        self._folder = tempfile.TemporaryDirectory(prefix="fleet-")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._registry = EngineRegistry()
        self._route: Route | NoRoute = NoRoute("no route was chosen")
        self.control = self._call(self._open())
        for shape in shapes:
            self._start(model, shape, connector)
        self._wait({shape.name for shape in shapes})

    def close(self) -> None:
        self._children.stop()
        with contextlib.suppress(Exception):
            self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._folder.cleanup()

    def answer(self, prefill: str, decode: str, tokens: list[int], count: int) -> tuple[list[int], TokenDelta]:
        """Greedy output, and the last delta, which says how it was made."""
        self._route = Route(self._engine(decode), self._engine(prefill))
        return self._call(self._generate(tokens, count))

    def introduce(self, prefill: str, decode: str) -> None:
        """As a router does when both have registered: they shake hands, before any request."""

        async def send() -> None:
            source = self._engine(prefill).register
            self._connections.send(
                self._engine(decode).sender, Introduce([PeerAddress(source.identity, source.peer_address)])
            )

        self._call(send())

    def send(self, name: str, message: Generate) -> Tokens | PromptScores | RequestError:
        """What the engine answers first to a message of a frontend; the request is then left to itself."""

        async def first() -> Tokens | PromptScores | RequestError:
            queue: StreamQueue = asyncio.Queue()
            self._connections.open(message, self._engine(name), queue)
            _, answer = await queue.get()
            assert not isinstance(answer, Stalled)
            return answer

        return self._call(first())

    def status(self, name: str) -> EngineStatus:
        return self._engine(name).status

    def wait_for_peer(self, decode: str, prefill: str) -> PeerInfo:
        """The decode engine's session with the prefill engine, once its status tells of it."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < deadline:
            for peer in self.status(decode).peers:
                if peer.engine_id == prefill and peer.handshake_time is not None:
                    return peer
            time.sleep(0.05)
        raise AssertionError(f"{decode} never told of {prefill}")

    def choose(
        self, exclude: Collection[str] = (), fingerprint: str | None = None, prompt: Prompt = ANY_PROMPT
    ) -> Route | NoRoute:
        """The routing policy of its router: the route of the answer that is being made."""
        return self._route

    # --- inside --------------------------------------------------------------------------------------------------

    def _engine(self, name: str) -> EngineEntry:
        return next(engine for engine in self._registry if engine.engine_id == name)

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(ANSWER_SECONDS)

    async def _open(self) -> Address:
        sockets: Sockets[zmq.asyncio.Socket] = Sockets(zmq.asyncio.Context(), None)
        socket, port = sockets.bind(zmq.ROUTER, "127.0.0.1", 0, CONTROL_SOCKET)
        self._connections = EngineConnections(socket, self._registry, introduce=False)
        self._router = RequestRouter(
            self._connections, self, request_timeout=ANSWER_SECONDS, route_timeout=ANSWER_SECONDS
        )
        self._receiving = asyncio.create_task(self._connections.run())
        return Address("127.0.0.1", port)

    async def _close(self) -> None:
        self._receiving.cancel()
        await asyncio.gather(self._receiving, return_exceptions=True)
        self._connections.stop()

    async def _generate(self, tokens: list[int], count: int) -> tuple[list[int], TokenDelta]:
        sampling = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
        output: list[int] = []
        last = None
        async for delta in self._router.generate(TokenRequest("shapes", tokens, sampling)):
            output += delta.token_ids
            last = delta
        assert last is not None
        return output, last

    def _start(self, model: Path, shape: Shape, connector: str) -> None:
        parallel = ParallelSection(shape.tp, shape.pp)
        config = EngineConfig(
            role="mixed",
            model=ModelSection(dtype="float32"),
            engine_id=shape.name,
            cache=CacheSection(shape.block_size, self._cache_bytes, verify_kv=self._verify_kv),
            batch=BatchSection(max_num_seqs=16, max_batched_tokens=self._batch_tokens),
            parallel=parallel,
            network=NetworkSection(connector=connector),
            time=TimeSection(start_timeout=START_SECONDS, lease_ttl=30.0),
            run=RunSection(threads=1, log_level="warning"),
        )
        meeting = f"{self._folder.name}/{shape.name}" if parallel.world_size > 1 else None
        folder = ModelFolder(str(model), "random")
        for rank in range(parallel.world_size):
            placement = RankPlacement(rank, rank, "127.0.0.1", meeting, (self.control,), None, folder)
            self._children.start(f"{shape.name} rank {rank}", self._main, config, placement)

    def _wait(self, names: set[str]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while {engine.engine_id for engine in self._registry.ready("mixed")} != names:
            assert time.monotonic() < deadline, f"only {[e.engine_id for e in self._registry]} of {names} started"
            self._children.next_report(self._children.children, 0.2)
