"""Send a request along a route: prefill and decode at once, and on another route if an engine fails it.

The same class stands behind the router and behind an engine's own API; they differ in their routing policy.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from tandem.api.backend import Health, ModelCard, TokenDelta, TokenRequest
from tandem.errors import EngineFailed, EngineLost, KvRetry, RequestError, Unavailable
from tandem.router.attempt import FATAL, Attempt
from tandem.router.engine_connections import EngineConnections
from tandem.router.engine_registry import EngineEntry
from tandem.router.first_token import OutputMerger
from tandem.router.policy import NoRoute, Route, RoutingPolicy

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
RESUME_SECONDS = 5.0
RESUME_POLL_SECONDS = 0.1


class RequestRouter:
    """Backend of the HTTP application over the engines of `connections`.

    Args:
        policy: chooses the engines that take a request.
        request_timeout: seconds in which a request must end.
        seed: for requests that bring none; None draws one for each.
    """

    def __init__(
        self, connections: EngineConnections, policy: RoutingPolicy, *, request_timeout: float, seed: int | None = None
    ) -> None:
        self._connections = connections
        self._policy = policy
        self._timeout = request_timeout
        self._seed = seed
        self._created = int(time.time())
        self._count = 0

    async def model(self) -> ModelCard:
        engine = self._connections.registry.served()
        if engine is None:
            raise Unavailable("no engine has registered yet", retry_after=2)
        register = engine.register
        return ModelCard(register.status.model, register.model_path, register.max_model_len, self._created, self._seed)

    def health(self) -> Health:
        route = self._policy.choose()
        return Health(False, route.reason) if isinstance(route, NoRoute) else Health(True, "ready")

    def engines(self) -> list[EngineEntry]:
        return list(self._connections.registry)

    async def generate(self, request: TokenRequest) -> AsyncGenerator[TokenDelta, None]:
        merger = OutputMerger(time.monotonic())
        exclude: set[str] = set()
        failure: RequestError | None = None
        fingerprint: str | None = None
        for number in range(MAX_ATTEMPTS):
            begun = fingerprint if merger.tokens else None
            route = await self._choose(exclude, begun, failure, merger.started + self._timeout)
            fingerprint = route.decode.status.fingerprint
            merger.forget_early()
            attempt = Attempt(self._connections, request, route, merger, number, self._timeout)
            try:
                async with aclosing(attempt.run()) as deltas:
                    async for delta in deltas:
                        yield delta
                return
            except FATAL:
                raise
            except RequestError as error:
                log.warning("request %s: %s; trying another route", request.request_id, error)
                failure = error
                exclude.add(_at_fault(error, route).incarnation)
        raise failure or EngineFailed("no attempt succeeded")

    async def _choose(
        self, exclude: set[str], fingerprint: str | None, failure: RequestError | None, end: float
    ) -> Route:
        """Return a route for the next attempt. After the loss of an engine it waits a while for one to come (back).

        Args:
            fingerprint: of the engines that made the tokens so far: an answer is of one model.
            end: when the request must have ended.
        """
        deadline = min(end, time.monotonic() + (RESUME_SECONDS if isinstance(failure, EngineLost) else 0.0))
        route = self._policy.choose(exclude, fingerprint)
        while isinstance(route, NoRoute):
            if time.monotonic() >= deadline:
                raise failure or Unavailable(route.reason, retry_after=2)
            await asyncio.sleep(RESUME_POLL_SECONDS)
            route = self._policy.choose(exclude, fingerprint)
            if isinstance(route, NoRoute):
                route = self._policy.choose((), fingerprint)  # what was lost may be heard of again
        self._count += 1
        for engine in (route.prefill, route.decode):
            if engine is not None:
                engine.last_chosen = self._count
        return route


def _at_fault(error: RequestError, route: Route) -> EngineEntry:
    """Return the engine of a route that the next attempt had better avoid."""
    if route.prefill is not None and (isinstance(error, KvRetry) or error.engine == route.prefill.incarnation):
        return route.prefill
    return route.decode
