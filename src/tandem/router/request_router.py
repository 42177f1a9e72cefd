"""Send a request along a route: prefill and decode at once, and on another route if an engine fails it.

The same class stands behind the router and behind an engine's own API; they differ in their routing policy.
"""

from __future__ import annotations

import functools
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing

from tandem.api.backend import Health, ModelCard, TokenDelta, TokenRequest
from tandem.errors import KvRetry, RequestError, Unavailable
from tandem.router.attempt import Attempt
from tandem.router.engine_connections import EngineConnections
from tandem.router.engine_registry import EngineEntry
from tandem.router.first_token import OutputMerger
from tandem.router.policy import ANY_PROMPT, NoRoute, Prompt, Route, RoutingPolicy
from tandem.router.prefix_index import PrefixIndex, PrefixKeys, prefix_keys
from tandem.router.retries import GONE, RETRIED, Retries

log = logging.getLogger(__name__)


class RequestRouter:
    """Backend of the HTTP application over the engines of `connections`.

    Args:
        policy: chooses the engines that take a request.
        request_timeout: seconds in which a request must end.
        route_timeout: seconds for which a request waits for engines when those that were there are gone.
        seed: for requests that bring none; None draws one for each.
        kv_aware: whether requests go where the beginning of their prompt is cached.
    """

    def __init__(
        self,
        connections: EngineConnections,
        policy: RoutingPolicy,
        *,
        request_timeout: float,
        route_timeout: float,
        seed: int | None = None,
        kv_aware: bool = True,
    ) -> None:
        self._connections = connections
        self._policy = policy
        self._timeout = request_timeout
        self._route_timeout = route_timeout
        self._had_route = False
        self._seed = seed
        self._prefixes = PrefixIndex()
        self._kv_aware = kv_aware
        self._created = int(time.time())
        self._count = 0

    async def model(self) -> ModelCard:
        engine = self._connections.registry.served()
        if engine is None:
            raise Unavailable("no engine has registered yet", retry_after=2)
        register = engine.register
        return ModelCard(
            name=register.status.model,
            path=register.model_path,
            max_model_len=register.max_model_len,
            created=self._created,
            seed=self._seed,
            aliases=tuple(register.model_aliases),
        )

    def health(self) -> Health:
        route = self._find()  # at every change of an engine; so a route that nobody has used yet is known too
        if isinstance(route, NoRoute):
            return Health(False, route.reason, whole=False)
        if route.is_makeshift:
            return Health(True, f"{route.reason}: decode engines serve alone", whole=False)
        return Health(True, "ready")

    def engines(self) -> list[EngineEntry]:
        return list(self._connections.registry)

    async def generate(self, request: TokenRequest) -> AsyncGenerator[TokenDelta, None]:
        merger = OutputMerger(time.monotonic())
        retries = Retries(self._connections.registry.is_ready)
        failure: RequestError | None = None
        fingerprint: str | None = None
        keys = prefix_keys(request.token_ids, request.cache_salt) if self._kv_aware else []
        for number in itertools.count():
            prompt = Prompt(len(request.token_ids), self._prefixes.matches(keys))
            begun = fingerprint if merger.tokens else None
            route = await self._choose(retries.exclude, begun, failure, merger.started + self._timeout, prompt)
            fingerprint = route.decode.status.fingerprint
            self._note_cached(keys, route.prefill, route.decode)
            merger.forget_early()
            attempt = Attempt(
                self._connections,
                request,
                route,
                merger,
                number,
                self._timeout,
                functools.partial(self._has_other_route, retries, merger, fingerprint),
            )
            try:
                async with aclosing(attempt.run()) as deltas:
                    async for delta in deltas:
                        yield delta
                if self._kv_aware:
                    self._note_cached(prefix_keys(request.token_ids + merger.tokens, request.cache_salt), route.decode)
                return
            except RETRIED as error:
                log.warning("request %s: %s", request.request_id, error)
                failure = error
                retries.add(error, frozenset(attempt.lost), _at_fault(error, route).incarnation)

    async def _choose(
        self,
        exclude: set[str],
        fingerprint: str | None,
        failure: RequestError | None,
        deadline: float,
        prompt: Prompt,
    ) -> Route:
        """Return a route for the next attempt.

        Where no engines are there, it waits for some to come (back), --route-timeout or until the deadline: one that
        was lost is replaced within seconds. It does not wait for a cluster that has never been there.

        Args:
            fingerprint: of the engines that made the tokens so far: an answer is of one model.
            failure: of the attempt before; raised if there is no other route.
        """
        until = min(deadline, time.monotonic() + self._route_timeout)
        while isinstance(route := self._find(exclude, fingerprint, prompt), NoRoute):
            anybody = self._policy.choose((), fingerprint, prompt)
            if isinstance(anybody, Route) and isinstance(failure, GONE):
                route = anybody  # what was lost has come back
                break
            left = until - time.monotonic()
            waits = isinstance(anybody, NoRoute) and anybody.may_come and self._had_route and left > 0
            if not waits:
                raise failure or Unavailable(route.reason, retry_after=2)
            await self._connections.changed(left)
        self._count += 1
        for engine in (route.prefill, route.decode):
            if engine is not None:
                engine.last_chosen = self._count
        return route

    def _has_other_route(self, retries: Retries, merger: OutputMerger, fingerprint: str) -> bool:
        return isinstance(self._find(retries.exclude, fingerprint if merger.tokens else None), Route)

    def _note_cached(self, keys: PrefixKeys, *engines: EngineEntry | None) -> None:
        """Note that engines have, or will soon have, the KV of a text."""
        for engine in engines:
            if engine is None or not keys:
                continue
            if engine.incarnation not in self._prefixes:
                self._prefixes.keep_only({known.incarnation for known in self._connections.registry})
            kv = engine.status.kv
            self._prefixes.add(engine.incarnation, keys, kv.blocks * kv.block_size)

    def _find(
        self, exclude: Collection[str] = (), fingerprint: str | None = None, prompt: Prompt = ANY_PROMPT
    ) -> Route | NoRoute:
        route = self._policy.choose(exclude, fingerprint, prompt)
        self._had_route |= isinstance(route, Route)
        return route


def _at_fault(error: RequestError, route: Route) -> EngineEntry:
    """Return the engine of a route that the next attempt had better avoid."""
    if route.prefill is not None and (isinstance(error, KvRetry) or error.engine == route.prefill.incarnation):
        return route.prefill
    return route.decode
