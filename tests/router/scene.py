"""A router, and engines that speak the wire messages over real sockets and say what a test makes them say."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgspec
import zmq
import zmq.asyncio

from tandem.api.backend import TokenDelta, TokenRequest
from tandem.errors import RequestError
from tandem.ids import EngineIdentity
from tandem.router.hub import Hub
from tandem.router.registry import EngineRegistry
from tandem.router.router import Router, pair_finder
from tandem.wire.codec import Codec
from tandem.wire.messages import (
    Abort,
    Address,
    EngineStatus,
    Failed,
    Generate,
    Goodbye,
    Introduce,
    KvUsage,
    Outputs,
    Prefill,
    PullKv,
    Register,
    Registered,
    RequestCounts,
    RequestStats,
    ToEngine,
    Tokens,
)
from tandem.wire.sampling import SamplingParams
from tandem.wire.sockets import SocketOptions, Sockets

PATIENCE = 20.0
PROMPT = [5, 6, 7]


def make_status(identity: EngineIdentity, role: str, **changes: object) -> EngineStatus:
    status = EngineStatus(
        engine_id=identity.engine_id,
        incarnation=identity.incarnation,
        role=role,
        model="tiny",
        fingerprint="f",
        tp=1,
        pp=1,
        nnodes=1,
        connector="tcp",
        ranks=[],
        kv=KvUsage(block_size=16, blocks=10, free=10, cached=0, leased=0, in_use=0),
        requests=RequestCounts(),
        peers=[],
    )
    return msgspec.structs.replace(status, **changes)


def make_register(identity: EngineIdentity, role: str, **changes: object) -> Register:
    return Register(
        identity=identity,
        status=make_status(identity, role, **changes),
        peer_address=Address("127.0.0.1", 20001),
        max_model_len=100,
        max_waiting=10,
        model_path="/model",
        dtype="float32",
        version="0",
        protocol=(1, 1),
    )


class FakeEngine:
    """One life of an engine. `heard` has what came, less the answers to heartbeats."""

    def __init__(self, engine_id: str, role: str, sockets: Sockets[zmq.asyncio.Socket], port: int) -> None:
        self.identity = EngineIdentity(engine_id, uuid.uuid4().hex)
        self.role = role
        self.heard: asyncio.Queue[Generate | Abort] = asyncio.Queue()
        self.introduced: list[str] = []
        self.registered = asyncio.Event()
        self.not_known = asyncio.Event()
        self._codec: Codec[ToEngine] = Codec(ToEngine)
        options = SocketOptions(identity=self.identity.incarnation.encode())
        self._socket = sockets.connect(zmq.DEALER, "127.0.0.1", port, options)
        self._task = asyncio.create_task(self._listen())

    def send(self, message: object) -> None:
        self._socket.send(self._codec.encode(message))

    def send_raw(self, data: bytes) -> None:
        self._socket.send(data)

    def beat(self, **changes: object) -> None:
        self.send(make_status(self.identity, self.role, **changes))

    async def register(self, connection: int = 0, **changes: object) -> FakeEngine:
        self.registered.clear()
        register = make_register(self.identity, self.role, **changes)
        self.send(msgspec.structs.replace(register, connection=connection))
        await within(self.registered.wait())
        return self

    async def next(self, kind: type[Generate] | type[Abort]) -> Generate | Abort:
        message = await within(self.heard.get())
        assert isinstance(message, kind), message
        return message

    async def request(self) -> Generate:
        message = await self.next(Generate)
        assert isinstance(message, Generate)
        return message

    def say(self, request: Generate, index: int, *tokens: int, finish: str | None = None, done: bool = False) -> None:
        stats = RequestStats(transport="tcp", bytes=64) if isinstance(request.kv, PullKv) else RequestStats()
        done = done or finish is not None
        self.send(
            Outputs(
                [
                    Tokens(
                        request.request_id,
                        index,
                        list(tokens),
                        finish_reason=finish,
                        done=done,
                        stats=stats if done else None,
                    )
                ]
            )
        )

    def fail(self, request: Generate, code: str = "engine_failed", text: str = "it broke") -> None:
        self.send(Outputs([Failed(request.request_id, code, text, retry_after=3 if code == "overloaded" else None)]))

    def leave(self) -> None:
        self.send(Goodbye("it was told to"))

    async def close(self) -> None:
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
                case Generate() | Abort() as message:
                    self.heard.put_nowait(message)


@dataclass
class Answer:
    """What a request has got so far."""

    task: asyncio.Task[None]
    deltas: asyncio.Queue[TokenDelta]
    tokens: list[int] = field(default_factory=list)
    last: TokenDelta | None = None

    async def until(self, count: int) -> list[int]:
        """Its tokens, once there are so many."""
        while len(self.tokens) < count:
            await self._next()
        return self.tokens

    async def whole(self) -> list[int]:
        """All its tokens; raises what the request raised."""
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


class Scene:
    """A router with its hub on a socket of its own."""

    def __init__(self, pool: EngineRegistry, timeout: float) -> None:
        self.pool = pool
        self._context = zmq.asyncio.Context()
        self._sockets: Sockets[zmq.asyncio.Socket] = Sockets(self._context, None)
        socket, self._port = self._sockets.bind(zmq.ROUTER, "127.0.0.1", 0, SocketOptions(handover=True))
        self.hub = Hub(socket, pool, introduce=True)
        self._changed = asyncio.Event()
        self.hub.on_change = self._changed.set
        self.router = Router(self.hub, pool, pair_finder(pool), request_timeout=timeout)
        self._engines: list[FakeEngine] = []

    async def engine(self, engine_id: str, role: str, **changes: object) -> FakeEngine:
        """A registered engine."""
        engine = self.stranger(engine_id, role)
        return await engine.register(**changes)

    def stranger(self, engine_id: str, role: str) -> FakeEngine:
        """One that has not registered yet."""
        engine = FakeEngine(engine_id, role, self._sockets, self._port)
        self._engines.append(engine)
        return engine

    async def pair(self) -> tuple[FakeEngine, FakeEngine]:
        return await self.engine("prefill-0", "prefill"), await self.engine("decode-0", "decode")

    def ask(self, max_tokens: int = 8, seed: int = 1) -> Answer:
        request = TokenRequest(f"request-{uuid.uuid4().hex[:6]}", PROMPT, SamplingParams(max_tokens, seed=seed))
        deltas: asyncio.Queue[TokenDelta] = asyncio.Queue()

        async def run() -> None:
            async for delta in self.router.generate(request):
                deltas.put_nowait(delta)

        return Answer(asyncio.create_task(run()), deltas)

    async def until(self, condition: Callable[[], object]) -> None:
        """Until a change at the hub makes it true."""
        while not condition():
            self._changed.clear()
            await within(self._changed.wait())

    async def close(self) -> None:
        for engine in self._engines:
            await engine.close()
        self.hub.stop()
        self._context.destroy(linger=0)


@asynccontextmanager
async def scene(pool: EngineRegistry | None = None, timeout: float = 600.0) -> AsyncIterator[Scene]:
    made = Scene(pool or EngineRegistry(), timeout)
    running = asyncio.create_task(made.hub.run())
    try:
        yield made
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await made.close()


async def within(awaitable: object) -> object:
    """Fails rather than to wait for ever."""
    return await asyncio.wait_for(awaitable, PATIENCE)  # type: ignore[arg-type]


def split(prefill: Generate, decode: Generate) -> None:
    """The two halves of one hand-off belong together."""
    assert isinstance(prefill.kv, Prefill)
    assert isinstance(decode.kv, PullKv)
    assert decode.kv.remote_request_id == prefill.request_id == decode.request_id
