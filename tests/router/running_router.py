"""A router, and engines that speak the wire messages over real sockets and send what a test makes them send."""

from __future__ import annotations

import asyncio
import select
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import zmq
import zmq.asyncio

from tandem.api.backend import ServingDetails, TokenDelta, TokenRequest
from tandem.errors import RequestError
from tandem.ids import EngineIdentity, output_digest
from tandem.router.connection_monitor import CONTROL_SOCKET
from tandem.router.engine_connections import EngineConnections
from tandem.router.engine_operator import EngineOperator
from tandem.router.engine_registry import EngineEntry, EngineRegistry
from tandem.router.policy import OneModelPolicy
from tandem.router.request_router import RequestRouter
from tandem.wire.codec import Codec
from tandem.wire.control_messages import ChangeRole, DrainEngine
from tandem.wire.messages import (
    Abort,
    Failed,
    Generate,
    Goodbye,
    Introduce,
    Outputs,
    Prefill,
    PullKv,
    Registered,
    RequestStats,
    ToEngine,
    ToFrontend,
    Tokens,
)
from tandem.wire.sampling import SamplingParams
from tandem.wire.sockets import SocketOptions, Sockets
from tests.support.registrations import make_register, make_status

T = TypeVar("T")

PATIENCE = 20.0
PROMPT = [5, 6, 7]


async def within(awaitable: Awaitable[T]) -> T:
    """Fail rather than wait for ever."""
    return await asyncio.wait_for(awaitable, PATIENCE)


class ScriptedEngine:
    """One incarnation of an engine. `heard` has what came of requests, `told` what the engine itself is to do."""

    def __init__(self, engine_id: str, role: str, sockets: Sockets[zmq.asyncio.Socket], port: int) -> None:
        self.identity = EngineIdentity(engine_id, uuid.uuid4().hex)
        self.role = role
        self.heard: asyncio.Queue[Generate | Abort] = asyncio.Queue()
        self.told: asyncio.Queue[DrainEngine | ChangeRole] = asyncio.Queue()
        self.introduced: list[str] = []
        self.heard_introduction = asyncio.Event()
        self.registered = asyncio.Event()
        self.not_known = asyncio.Event()
        self._codec: Codec[ToEngine] = Codec(ToEngine)
        self._url = f"tcp://127.0.0.1:{port}"
        options = SocketOptions(identity=self.identity.incarnation.encode())
        self._socket = sockets.connect(zmq.DEALER, "127.0.0.1", port, options)
        self._task = asyncio.create_task(self._listen())

    def send(self, message: ToFrontend) -> None:
        self._socket.send(self._codec.encode(message))

    def send_raw(self, data: bytes) -> None:
        self._socket.send(data)

    def beat(self, **changes: Any) -> None:
        self.send(make_status(self.identity, self.role, **changes))

    async def register(self, connection: int = 0, **changes: Any) -> ScriptedEngine:
        self.registered.clear()
        register = make_register(self.identity, self.role, **changes)
        self.send(msgspec.structs.replace(register, connection=connection))
        await within(self.registered.wait())
        return self

    async def is_introduced_to(self, other: ScriptedEngine) -> None:
        """Return once it has heard of the other one."""
        while other.identity.incarnation not in self.introduced:
            self.heard_introduction.clear()
            await within(self.heard_introduction.wait())

    async def request(self) -> Generate:
        """Return the next request, past the aborts of those before."""
        while not isinstance(message := await within(self.heard.get()), Generate):
            pass
        return message

    async def abort(self) -> Abort:
        message = await within(self.heard.get())
        assert isinstance(message, Abort), message
        return message

    def send_tokens(
        self,
        request: Generate,
        index: int,
        /,
        *tokens: int,
        finish: str | None = None,
        done: bool = False,
        after: Sequence[int] | None = None,
        **fields: Any,
    ) -> None:
        """Send tokens that go on from `after`, the output before them; by default 10, 11, 12 ..."""
        pulls = isinstance(request.kv, PullKv)
        done = done or finish is not None
        stats = (RequestStats(transport="tcp", bytes=64) if pulls else RequestStats()) if done else None
        digest = output_digest(range(10, 10 + index) if after is None else after)
        message = Tokens(
            request.request_id, index, list(tokens), finish_reason=finish, digest=digest, done=done, stats=stats
        )
        self.send(Outputs([msgspec.structs.replace(message, **fields)]))

    def fail(self, request: Generate, code: str = "engine_failed", text: str = "it broke") -> None:
        self.send(Outputs([Failed(request.request_id, code, text, retry_after=3 if code == "overloaded" else None)]))

    def leave(self, *, failed: bool = False) -> None:
        self.send(Goodbye("it was told to", failed))

    def break_connection(self) -> None:
        """The connection ends; another one is made, and nothing is said by it yet."""
        self._socket.disconnect(self._url)
        self._socket.connect(self._url)

    async def end(self) -> None:
        """It ends in good order: what it has sent arrives."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._socket.close(linger=int(PATIENCE * 1000))

    async def close(self) -> None:
        """It is killed."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._socket.close(linger=0)

    async def _listen(self) -> None:
        while True:
            match self._codec.decode(await self._socket.recv()):
                case Registered(known=True):
                    self.registered.set()
                case Registered():
                    self.not_known.set()
                case Introduce(peers=peers):
                    self.introduced = [peer.identity.incarnation for peer in peers]
                    self.heard_introduction.set()
                case DrainEngine() | ChangeRole() as order:
                    self.told.put_nowait(order)
                case Generate() | Abort() as message:
                    self.heard.put_nowait(message)


@dataclass
class PendingAnswer:
    """The part of an answer that has come."""

    task: asyncio.Task[None]
    deltas: asyncio.Queue[TokenDelta]
    tokens: list[int] = field(default_factory=list)
    last: TokenDelta | None = None

    @property
    def details(self) -> ServingDetails:
        """Return how it was made, once it is whole."""
        assert self.last is not None
        assert self.last.details is not None
        return self.last.details

    async def until(self, count: int) -> list[int]:
        """Return its tokens, once there are `count`."""
        while len(self.tokens) < count:
            await self._next()
        return self.tokens

    async def whole(self) -> list[int]:
        """Return all its tokens, or raise what the request raised."""
        await within(asyncio.wait([self.task]))
        while not self.deltas.empty():
            await self._next()
        await self.task
        return self.tokens

    async def error(self) -> RequestError:
        try:
            await self.whole()
        except RequestError as error:
            return error
        raise AssertionError(f"it ended well, with {self.tokens}")

    async def leave(self) -> None:
        """The client has gone."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def _next(self) -> None:
        self.last = await within(self.deltas.get())
        self.tokens += self.last.token_ids


class RunningRouter:
    """A router whose engines connect to a socket of its own."""

    def __init__(self, registry: EngineRegistry, timeout: float, route_timeout: float) -> None:
        self.registry = registry
        self.context = zmq.asyncio.Context()
        self._sockets: Sockets[zmq.asyncio.Socket] = Sockets(self.context, None)
        socket, self._port = self._sockets.bind(zmq.ROUTER, "127.0.0.1", 0, CONTROL_SOCKET)
        self._changed = asyncio.Event()
        self.connections = EngineConnections(socket, registry, introduce=True, on_change=self._changed.set)
        self.backend = RequestRouter(
            self.connections, OneModelPolicy(registry), request_timeout=timeout, route_timeout=route_timeout
        )
        self.operator = EngineOperator(self.connections)
        self.engines: list[ScriptedEngine] = []

    def entry(self, engine_id: str) -> EngineEntry | None:
        return next((entry for entry in self.registry if entry.engine_id == engine_id), None)

    async def engine(self, engine_id: str, role: str, **changes: Any) -> ScriptedEngine:
        """Return a registered engine."""
        return await self.stranger(engine_id, role).register(**changes)

    def stranger(self, engine_id: str, role: str) -> ScriptedEngine:
        """Return one that has not registered yet."""
        engine = ScriptedEngine(engine_id, role, self._sockets, self._port)
        self.engines.append(engine)
        return engine

    async def pair(self) -> tuple[ScriptedEngine, ScriptedEngine]:
        return await self.engine("prefill-0", "prefill"), await self.engine("decode-0", "decode")

    def ask(self, max_tokens: int = 8, seed: int = 1, logprobs: int | None = None) -> PendingAnswer:
        sampling = SamplingParams(max_tokens, seed=seed, logprobs=logprobs)
        request = TokenRequest(f"request-{uuid.uuid4().hex[:6]}", PROMPT, sampling)
        deltas: asyncio.Queue[TokenDelta] = asyncio.Queue()

        async def run() -> None:
            async for delta in self.backend.generate(request):
                deltas.put_nowait(delta)

        return PendingAnswer(asyncio.create_task(run()), deltas)

    def miss_the_end_of_a_connection(self) -> None:
        """Stand still until one has ended: what has come by it meanwhile, and its end, are there to be found."""
        events = int(self.connections._monitor._monitor.get(zmq.FD))
        readable, _, _ = select.select([events], [], [], PATIENCE)
        assert readable

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until a change of an engine makes it true."""
        while not condition():
            self._changed.clear()
            await within(self._changed.wait())


@asynccontextmanager
async def running_router(
    registry: EngineRegistry | None = None, timeout: float = 600.0, route_timeout: float = 60.0
) -> AsyncIterator[RunningRouter]:
    router = RunningRouter(registry or EngineRegistry(), timeout, route_timeout)
    running = asyncio.create_task(router.connections.run())
    try:
        yield router
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        for engine in router.engines:
            await engine.close()
        router.connections.stop()
        router.context.destroy(linger=0)


def assert_one_hand_off(prefill: Generate, decode: Generate) -> None:
    """The two requests are the halves of one."""
    assert isinstance(prefill.kv, Prefill)
    assert isinstance(decode.kv, PullKv)
    assert decode.kv.remote_request_id == prefill.request_id == decode.request_id
