"""Takes a request along its path: prefill and decode at once, first token from the one, the rest from the other.

The same class stands behind the router and behind an engine's own API; they differ in how they find the path.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tandem.api.backend import Health, ModelCard, ServingDetails, TokenDelta, TokenRequest
from tandem.errors import (
    EngineFailed,
    EngineLost,
    InvalidRequest,
    KvLost,
    KvRetry,
    Overloaded,
    RequestError,
    TimedOut,
    Unavailable,
)
from tandem.router.hub import Channel, Hub, Inbox
from tandem.router.policy import Route, choose_route, choose_route_of_one_model
from tandem.router.registry import EngineEntry, EngineRegistry
from tandem.wire.messages import (
    Address,
    EngineStatus,
    Generate,
    KvTransferParams,
    Local,
    Prefill,
    PullKv,
    RequestStats,
    TokenLogprobs,
    Tokens,
)

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
GRACE = 5.0
FATAL = (InvalidRequest, KvLost, TimedOut)
RESUME_SECONDS = 5.0
RESUME_POLL_SECONDS = 0.1

FindPath = Callable[[set[str], str | None], Route | str]
"""The path for a request, or why there is none: avoiding these incarnations, with engines of this fingerprint."""


@dataclass(slots=True)
class OutputMerger:
    """Output of one request over all attempts, put in order: two engines may each send a part of it."""

    started: float
    tokens: list[int] = field(default_factory=list)
    early: dict[int, tuple[int, TokenLogprobs | None]] = field(default_factory=dict)
    first_token_at: float = 0.0

    @property
    def has_gap(self) -> bool:
        """Whether tokens wait for one before them, after `take`."""
        return bool(self.early)

    def take(self, message: Tokens) -> tuple[list[int], list[TokenLogprobs] | None]:
        """Tokens that are next in line now; what came before is dropped, what comes too early waits."""
        for offset, token in enumerate(message.token_ids):
            index = message.index + offset
            if index >= len(self.tokens):
                self.early[index] = (token, message.logprobs[offset] if message.logprobs else None)
        fresh: list[int] = []
        logprobs: list[TokenLogprobs] = []
        while (entry := self.early.pop(len(self.tokens), None)) is not None:
            self.tokens.append(entry[0])
            fresh.append(entry[0])
            if entry[1] is not None:
                logprobs.append(entry[1])
        if fresh and not self.first_token_at:
            self.first_token_at = time.monotonic()
        return fresh, logprobs or None


class Router:
    """Backend of the HTTP application over the engines of a hub.

    Args:
        find_path: which engines take a request.
        request_timeout: seconds in which a request must end.
        seed: for requests that bring none; None draws one for each.
    """

    def __init__(
        self, hub: Hub, pool: EngineRegistry, find_path: FindPath, *, request_timeout: float, seed: int | None = None
    ) -> None:
        self._hub = hub
        self._pool = pool
        self._find_path = find_path
        self._timeout = request_timeout
        self._seed = seed
        self._created = int(time.time())
        self._count = 0

    # --- what the API asks -----------------------------------------------------------------------------------

    async def model(self) -> ModelCard:
        member = self._pool.served()
        if member is None:
            raise Unavailable("no engine has registered yet", retry_after=2)
        register = member.register
        return ModelCard(register.status.model, register.model_path, register.max_model_len, self._created, self._seed)

    def health(self) -> Health:
        path = self._find_path(set(), None)
        return Health(False, path) if isinstance(path, str) else Health(True, "ready")

    def engines(self) -> list[tuple[EngineStatus, str]]:
        return [(m.status, m.state.value) for m in self._pool]

    def describe_engine(self, status: EngineStatus) -> dict[str, Any]:
        described: dict[str, Any] = msgspec.to_builtins(status)
        del described["type"]
        member = self._pool.find(status.engine_id, status.incarnation)
        if member is not None:
            register = member.register
            described |= {
                "version": register.version,
                "dtype": register.dtype,
                "max_model_len": register.max_model_len,
                "peer_address": str(register.peer_address),
                "http_address": str(register.http_address) if register.http_address else None,
            }
        return described

    async def generate(self, request: TokenRequest) -> AsyncGenerator[TokenDelta, None]:
        progress = OutputMerger(time.monotonic())
        avoid: set[str] = set()
        failure: RequestError | None = None
        weights: str | None = None
        for attempt in range(MAX_ATTEMPTS):
            path = await self._path(avoid, weights if progress.tokens else None, failure)
            weights = path.decode.status.fingerprint
            progress.early.clear()
            self._mark(path)
            try:
                async with aclosing(self._attempt(request, path, progress, attempt)) as deltas:
                    async for delta in deltas:
                        yield delta
                return
            except FATAL:
                raise
            except RequestError as error:
                log.warning("request %s: %s; trying another path", request.request_id, error)
                failure = error
                avoid.add(_at_fault(error, path).incarnation)
        raise failure or EngineFailed("no attempt succeeded")

    async def _path(self, avoid: set[str], weights: str | None, failure: RequestError | None) -> Route:
        """A path for the next attempt. After the loss of an engine it waits a while for one to come (back).

        Args:
            weights: fingerprint of the engines that made the tokens so far: an answer is of one model.
        """
        path = self._find_path(avoid, weights)
        deadline = time.monotonic() + (RESUME_SECONDS if isinstance(failure, EngineLost) else 0.0)
        while isinstance(path, str):
            if time.monotonic() >= deadline:
                raise failure or Unavailable(path, retry_after=2)
            await asyncio.sleep(RESUME_POLL_SECONDS)
            path = self._find_path(avoid, weights)
            if isinstance(path, str):
                path = self._find_path(set(), weights)  # what was lost may be heard of again
        return path

    # --- one attempt -------------------------------------------------------------------------------------------

    def _mark(self, path: Route) -> None:
        self._count += 1
        for member in (path.prefill, path.decode):
            if member is not None:
                member.chosen = self._count

    async def _attempt(
        self, request: TokenRequest, path: Route, progress: OutputMerger, attempt: int
    ) -> AsyncGenerator[TokenDelta, None]:
        """One path, until the request ends. Raises a RequestError if this path cannot end it."""
        inbox: Inbox = asyncio.Queue()
        channels = self._open(request, path, progress, inbox)
        stats: dict[str, RequestStats] = {}
        end: tuple[int, Tokens] | None = None
        prefill_error: RequestError | None = None
        try:
            while True:
                if prefill_error is not None and progress.has_gap:
                    raise prefill_error  # the first token was its to send; the decode engine had it from its KV
                sender, message = await self._next(inbox, progress)
                if isinstance(message, RequestError):
                    message.engine = sender.member.incarnation
                    if sender.member is path.decode or isinstance(message, (*FATAL, Overloaded)):
                        raise message
                    log.warning("request %s: %s; the decode engine goes on alone", request.request_id, message)
                    prefill_error = message
                    continue
                if message.stats is not None:
                    stats[sender.member.incarnation] = message.stats
                fresh, logprobs = progress.take(message)
                if message.finish_reason is not None:
                    end = (message.index + len(message.token_ids), message)
                how = serving_details(path, stats, progress, attempt) if message.stats is not None else None
                if end is not None and len(progress.tokens) >= end[0]:
                    how = how or serving_details(path, stats, progress, attempt)
                    last = end[1]
                    params = self._published(path, last.kv_transfer_params)
                    yield TokenDelta(fresh, logprobs, last.finish_reason, last.stop_token_id, how, params)
                    return
                if fresh or how is not None:
                    yield TokenDelta(fresh, logprobs, how=how)
        finally:
            for channel in channels:
                self._hub.close(channel)

    def _open(self, request: TokenRequest, path: Route, progress: OutputMerger, inbox: Inbox) -> list[Channel]:
        """Send the request to the engines of the path, at once."""
        generate = Generate(
            request_id=f"{request.request_id}-{uuid.uuid4().hex[:8]}",
            token_ids=request.token_ids + progress.tokens,
            prompt_len=len(request.token_ids),
            sampling=request.sampling,
            time_left=max(0.0, progress.started + self._timeout - time.monotonic()),
        )
        if path.prefill is None:
            kv = foreign_kv(request.kv_transfer_params)
            return [self._hub.open(msgspec.structs.replace(generate, kv=kv), path.decode, inbox)]
        source = path.prefill.register
        pull = PullKv(source.identity.engine_id, source.identity.incarnation, source.peer_address, generate.request_id)
        return [
            self._hub.open(msgspec.structs.replace(generate, kv=Prefill()), path.prefill, inbox),
            self._hub.open(msgspec.structs.replace(generate, kv=pull), path.decode, inbox),
        ]

    async def _next(self, inbox: Inbox, progress: OutputMerger) -> tuple[Channel, Tokens | RequestError]:
        try:
            async with asyncio.timeout_at(
                asyncio.get_running_loop().time() + progress.started + self._timeout + GRACE - time.monotonic()
            ):
                return await inbox.get()
        except TimeoutError:
            raise TimedOut(f"the request did not end in {self._timeout:.0f} s") from None

    @staticmethod
    def _published(path: Route, params: KvTransferParams | None) -> KvTransferParams | None:
        """What a foreign proxy is given: the engine's address is known here, from its registration."""
        if params is None:
            return None
        address = path.decode.register.peer_address
        return msgspec.structs.replace(params, remote_host=address.host, remote_port=address.port)


def _at_fault(error: RequestError, path: Route) -> EngineEntry:
    """Which engine of a path the next attempt had better avoid."""
    if path.prefill is not None and (isinstance(error, KvRetry) or error.engine == path.prefill.incarnation):
        return path.prefill
    return path.decode


def foreign_kv(params: KvTransferParams | None) -> Local | Prefill | PullKv:
    """What a foreign proxy's `kv_transfer_params` ask for. Raises InvalidRequest."""
    if params is None or not (params.do_remote_decode or params.do_remote_prefill):
        return Local()
    if params.do_remote_decode:
        return Prefill(published=True)
    if not (params.remote_engine_id and params.remote_host and params.remote_port and params.remote_request_id):
        raise InvalidRequest(
            "kv_transfer_params with do_remote_prefill need remote_engine_id, remote_request_id, remote_host and"
            " remote_port, as the prefill engine returned them",
            param="kv_transfer_params",
        )
    return PullKv(
        params.remote_engine_id,
        params.remote_incarnation,
        Address(params.remote_host, params.remote_port),
        params.remote_request_id,
        first_token=False,
        foreign=True,
    )


def pair_finder(pool: EngineRegistry) -> FindPath:
    """How a router finds paths: among the engines of the one model, and the weights of it, that it serves."""
    current: str | None = None

    def find(avoid: set[str], weights: str | None) -> Route | str:
        nonlocal current
        served = pool.served()
        ready = pool.ready("prefill", "decode", "mixed")
        fitting = [m for m in ready if served is None or m.status.model == served.status.model]
        if weights is not None:
            return choose_route([m for m in fitting if m.status.fingerprint == weights], avoid)
        path, chosen = choose_route_of_one_model(fitting, avoid, current)
        if not avoid:  # what one request has to avoid changes nothing for the others
            current = chosen
        if isinstance(path, str) and served is not None and len(fitting) < len(ready):
            path += f"; {len(ready) - len(fitting)} engines of other models than {served.status.model} are not used"
        return path

    return find


def single_finder(pool: EngineRegistry) -> FindPath:
    """How an engine's own API does: that engine answers alone, whatever its role."""

    def find(avoid: set[str], _: str | None) -> Route | str:
        members = [m for m in pool.ready("prefill", "decode", "mixed") if m.incarnation not in avoid]
        return Route(members[0], reason="sent to this engine directly") if members else "the engine is not ready"

    return find


def serving_details(
    path: Route, stats: dict[str, RequestStats], progress: OutputMerger, attempt: int
) -> ServingDetails:
    """Merge what the engines of a path say of their parts."""
    none = RequestStats()
    decode = stats.get(path.decode.incarnation, none)
    prefill = stats.get(path.prefill.incarnation, none) if path.prefill is not None else decode
    pulled = decode.transport is not None
    reason = path.reason
    if path.prefill is not None and not pulled:
        reason = decode.recompute_reason or "it ended with the first token"
    if path.prefill is None:
        reason = None if pulled else decode.recompute_reason or path.reason
    prefix = {path.decode.engine_id: decode.prefix_tokens}
    if path.prefill is not None:
        prefix[path.prefill.engine_id] = prefill.prefix_tokens
    return ServingDetails(
        prefill_engine=decode.kv_source or (path.prefill or path.decode).engine_id,
        decode_engine=path.decode.engine_id,
        disaggregated=pulled,
        reason=reason,
        transport=decode.transport,
        queue_time=prefill.queue_time,
        prefill_time=prefill.prefill_time,
        transfer_time=decode.transfer_time,
        handoff_time=decode.handoff_time,
        ttft=progress.first_token_at - progress.started,
        prefix_tokens=prefix,
        blocks=decode.blocks,
        bytes=decode.bytes,
        descriptors=decode.descriptors,
        recomputations=prefill.recomputations + (decode.recomputations if path.prefill else 0) + attempt,
    )
