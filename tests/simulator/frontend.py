"""A router and its clients: the real registry, policy, connections and request router, without HTTP."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from tandem.api.backend import TokenRequest
from tandem.errors import RequestError
from tandem.router.engine_connections import EngineConnections
from tandem.router.engine_registry import EngineRegistry
from tandem.router.policy import OneModelPolicy
from tandem.router.request_router import RequestRouter
from tandem.wire.messages import Address
from tandem.wire.sampling import SamplingParams
from tests.simulator.network import Network
from tests.simulator.plan import Plan, RequestSpec
from tests.simulator.sockets import Sockets
from tests.simulator.world import Process, World


@dataclass(slots=True)
class Answer:
    """What a client got.

    Attributes:
        ended: how the request ended: its finish reason, the name of an error, "left" or "router died"; None if not yet.
        seconds: that it took, on the router's clock, without the router's pauses.
    """

    number: int
    spec: RequestSpec
    tokens: list[int] = field(default_factory=list)
    ended: str | None = None
    error: RequestError | None = None
    seconds: float = 0.0


class SimRouter:
    """One incarnation of a router."""

    def __init__(self, world: World, network: Network, plan: Plan, name: str, address: Address) -> None:
        self.world = world
        self.process = Process(world, name, 1.0, 1000.0 * world.random.random())
        self.registry = EngineRegistry()
        sockets = Sockets(network, self.process)
        world.current = self.process
        self.connections = EngineConnections(sockets.bind(address), self.registry, introduce=True)
        self.backend = RequestRouter(
            self.connections,
            OneModelPolicy(self.registry),
            request_timeout=plan.request_timeout,
            route_timeout=plan.request_timeout,
            seed=0,
        )
        self.connections.on_change = self._look
        world.current = None
        self._clients: dict[int, asyncio.Task[Any]] = {}
        self.answers: dict[int, Answer] = {}
        self.process.post(lambda: self.world.loop.create_task(self.connections.run()))

    def _look(self) -> None:
        """A router's process asks after its health at every change."""
        self.backend.health()

    def ask(self, answer: Answer) -> None:
        """Begin a client's request."""

        self.answers[answer.number] = answer

        def begin() -> None:
            self._clients[answer.number] = self.world.loop.create_task(self._serve(answer))

        self.process.post(begin)

    def dies(self) -> None:
        """Its clients lose their connections."""
        for answer in self.answers.values():
            answer.ended = answer.ended or "router died"

    def leave(self, answer: Answer) -> None:
        """The client goes away."""

        def cancel() -> None:
            task = self._clients.get(answer.number)
            if task is not None and answer.ended is None:
                task.cancel()

        self.process.post(cancel)

    async def _serve(self, answer: Answer) -> None:
        spec = answer.spec
        sampling = SamplingParams(max_tokens=spec.max_tokens, min_tokens=spec.min_tokens)
        request = TokenRequest(f"request-{answer.number}", list(spec.prompt), sampling)
        began, paused = time.monotonic(), self.process.paused_seconds
        deltas = self.backend.generate(request)
        ended = "no finish reason"
        try:
            async for delta in deltas:
                answer.tokens += delta.token_ids
                ended = delta.finish_reason or ended
        except RequestError as error:
            answer.error, ended = error, type(error).__name__
        except asyncio.CancelledError:
            ended = "left"
        finally:
            await deltas.aclose()
            if answer.ended is None:
                answer.ended = ended
                answer.seconds = time.monotonic() - began - (self.process.paused_seconds - paused)
