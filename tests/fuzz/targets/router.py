"""The router: its engines' messages on one side, clients over HTTP on the other."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import msgspec

from tandem.api.app import create_app
from tandem.api.loaded_model import LoadedModel, ModelLoader
from tandem.ids import EngineIdentity, output_digest
from tandem.router.engine_connections import EngineConnections
from tandem.router.engine_registry import EngineRegistry
from tandem.router.policy import OneModelPolicy
from tandem.router.request_router import RequestRouter
from tandem.wire.codec import Codec
from tandem.wire.engine_status import PeerInfo
from tandem.wire.messages import (
    Failed,
    Generate,
    Goodbye,
    Output,
    Outputs,
    PullKv,
    Register,
    RequestStats,
    ToEngine,
    ToFrontend,
    TokenLogprobs,
    Tokens,
)
from tests.fuzz.asgi import ALLOWED, Answer, call
from tests.fuzz.channel import Channel
from tests.fuzz.fakes import Clock, Defect, MonitoredSocket, OwnErrors
from tests.fuzz.target import Target
from tests.support.families import DEMO_MODEL
from tests.support.registrations import make_register

PREFILL, DECODE = EngineIdentity("p0", "life"), EngineIdentity("d0", "reader")
STRANGERS = [b"stranger", b"\0auto", b"x" * 255]
ENGINE_FAILED = {500, 504}
TIMEOUT = 600.0
ROUTE_TIMEOUT = 60.0
FIRST = 5
"""The token that the prefill engine samples."""
MOST_CLIENTS = 4
INFO = ["/health", "/metrics", "/v1/models", "/tandem/engines"]
_LOADED: list[LoadedModel] = []


def _register(identity: EngineIdentity, role: str, model: str = "demo") -> Register:
    plain = make_register(
        identity, role, model=model, peers=[PeerInfo("p0", "life", "ready")] if role == "decode" else []
    )
    return msgspec.structs.replace(plain, model_path=str(DEMO_MODEL), max_model_len=256)


HONEST = {
    identity.incarnation.encode(): _register(identity, role)
    for identity, role in ((PREFILL, "prefill"), (DECODE, "decode"))
}
REAL = [
    *HONEST.values(),
    *(one.status for one in HONEST.values()),
    _register(EngineIdentity("p0", "second"), "prefill"),
    _register(EngineIdentity("m0", "third"), "mixed", "other"),
    Goodbye("it was told to"),
]


class Router(Target):
    """Every client gets an answer that is whole, or an error that is the engines'; none waits for ever."""

    NAME = "router"

    def __init__(self, rng: random.Random, clock: Clock, errors: OwnErrors) -> None:
        super().__init__(rng, clock, errors)
        self._socket = MonitoredSocket()
        self._connections = EngineConnections(self._socket, EngineRegistry(), introduce=True)  # type: ignore[arg-type]
        policy = OneModelPolicy(self._connections.registry)
        backend = RequestRouter(self._connections, policy, request_timeout=TIMEOUT, route_timeout=ROUTE_TIMEOUT)
        self._loader = ModelLoader(backend)
        self._app = create_app(backend, self._loader, kind="router")
        self._codec: Codec[ToEngine] = Codec(ToEngine)
        names = ["life", "reader", "p0", "d0", "prefill", "decode", "mixed", "demo", "stop", "length", "f", "ready"]
        self._channel = Channel(ToFrontend, REAL, names, range(-1, 9), valid=0.4)
        self._clients: list[asyncio.Task[Answer]] = []
        self._top = rng.choice([None, None, 0, 2])
        self._open: list[tuple[bytes, Generate]] = []

    async def begin(self) -> None:
        self.spawn(self._connections.run())
        await self._introduce()
        if _LOADED:
            self._loader._loaded = _LOADED[0]  # read once: it takes longer than an episode
        else:
            _LOADED.append(await self._loader.get())

    async def _introduce(self) -> None:
        for sender, register in HONEST.items():
            self._put(sender, register)
        await self._socket.taken()

    def _put(self, sender: bytes, message: Any) -> None:
        self._socket.put(sender, msgspec.msgpack.encode(message))

    async def feed(self) -> None:
        rng = self.rng
        if len(self._clients) < MOST_CLIENTS and rng.random() < 0.3:
            self._clients.append(asyncio.ensure_future(self._ask()))
            await asyncio.sleep(0)
        if rng.random() < 0.02:
            self._socket.break_connection(rng.choice([*HONEST, *STRANGERS]))
        if rng.random() < 0.3:
            await self._introduce()
        self._take()
        if self._open and rng.random() < 0.4:
            self._answer(*self._open.pop(rng.randrange(len(self._open))))
        self.last = self._channel.data(rng)
        sender = rng.choice([*HONEST, *STRANGERS])
        self._socket.put(sender, *([self.last] if rng.random() < 0.98 else [self.last] * rng.choice([0, 2])))
        await self._socket.taken()
        for _ in range(3):
            await asyncio.sleep(0)
        if rng.random() < 0.03:
            await self._look()
        if rng.random() < 0.02:
            await self.clock.advance(rng.choice([0.6, 5.0, 70.0]))
        self._collect()

    async def _ask(self) -> Answer:
        rng = self.rng
        body: dict[str, Any] = {"prompt": [1, 2, 3], "max_tokens": 4, "stream": rng.random() < 0.5, "temperature": 0}
        if self._top is not None:
            body["logprobs"] = self._top
        return await call(self._app, "POST", "/v1/completions", json.dumps(body).encode())

    def _take(self) -> None:
        """Take what the router has sent, and learn from it what its engines may say."""
        while self._socket.sent:
            receiver, data = self._socket.sent.popleft()
            message = self._codec.decode(data)
            if isinstance(message, Generate):
                self._open.append((receiver, message))
                for one in _said(message):
                    self._channel.learn(Outputs([one]))
                self._channel.learn(Outputs([Failed(message.request_id, "engine_failed", "it broke")]))

    def _answer(self, sender: bytes, message: Generate) -> None:
        """Answer as engines do; sometimes one fails."""
        if self.rng.random() < 0.1:
            said: list[Output] = [Failed(message.request_id, "engine_failed", "it broke")]
        else:
            said = list(_said(message))
        self._put(sender, Outputs(said))

    async def _look(self) -> None:
        path = self.rng.choice(INFO)
        answer = await call(self._app, "GET", path)
        if answer.status not in (200, 503):
            raise Defect(f"{path}: {answer.status} {answer.body[:200]!r}")

    def _collect(self) -> None:
        for client in [client for client in self._clients if client.done()]:
            self._clients.remove(client)
            answer = client.result()
            if answer.status not in ALLOWED | ENGINE_FAILED:
                raise Defect(f"status {answer.status}: {answer.body[:300]!r}")

    async def end(self) -> None:
        await self.clock.advance(TIMEOUT + 10)
        for _ in range(100):
            await self.clock.advance(1)
            self._collect()
        if self._clients:
            raise Defect(f"{len(self._clients)} requests have no end")
        if self._connections._streams:
            raise Defect("streams of requests that have ended")

    async def close(self) -> None:
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        await super().close()
        self._connections.stop()


def _said(message: Generate) -> list[Tokens]:
    """Return an engine's output: the first token if it prefills, the others if it decodes."""
    request, stats, top = message.request_id, RequestStats(), message.sampling.logprobs
    begun = len(message.token_ids) - message.prompt_len
    reads = isinstance(message.kv, PullKv)
    before = [*message.token_ids[message.prompt_len :], *[FIRST] * reads]
    tokens = [6] * (message.sampling.max_tokens - begun - 1) if reads else [FIRST]
    logprobs = None if top is None else [TokenLogprobs(-0.5, [(1, -0.5)] * top)] * len(tokens)
    finish, digest = "length" if reads else None, output_digest(before)
    return [Tokens(request, len(before), tokens, logprobs, finish, done=True, stats=stats, digest=digest)]
