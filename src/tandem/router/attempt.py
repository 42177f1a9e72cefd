"""One attempt to answer a request: prefill and decode at once, their output merged, until the request ends."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

import msgspec

from tandem.api.backend import ServingDetails, TokenDelta, TokenRequest
from tandem.errors import EngineFailed, EngineLost, RequestError, TimedOut
from tandem.router.engine_connections import EngineConnections, EngineStream, Stalled, StreamQueue
from tandem.router.engine_registry import EngineEntry
from tandem.router.first_token import OutputMerger
from tandem.router.foreign_proxy import published_params, requested_kv
from tandem.router.policy import Route
from tandem.router.serving_details import serving_details
from tandem.wire.messages import Generate, Local, Prefill, PromptScores, PullKv, RequestStats, TokenLogprobs, Tokens
from tandem.wire.sampling import SamplingParams

log = logging.getLogger(__name__)

GRACE_SECONDS = 5.0
"""Engines end a request at its deadline; the router does it itself if nothing is heard of that."""


@dataclass(slots=True)
class Attempt:
    """A request on its route.

    Args:
        merger: the output of the request over all attempts.
        number: 0 for the first attempt.
        timeout: seconds in which the request must end.
        other_route: returns whether there is a route for this request now; one through a stalled engine is none.

    Attributes:
        lost: incarnations of engines that were lost meanwhile.
    """

    connections: EngineConnections
    request: TokenRequest
    route: Route
    merger: OutputMerger
    number: int
    timeout: float
    other_route: Callable[[], bool]
    lost: set[str] = field(default_factory=set)
    _queue: StreamQueue = field(default_factory=asyncio.Queue)
    _stats: dict[str, RequestStats] = field(default_factory=dict)
    _prefill_error: RequestError | None = None
    _resumed: int = 0
    _awaits_first_token: bool = False

    async def run(self) -> AsyncGenerator[TokenDelta, None]:
        """Yield output until the request ends. Raises a RequestError if this route cannot end it."""
        streams = self._open()
        last: Tokens | None = None
        try:
            while True:
                message = await self._receive()
                if isinstance(message, PromptScores):
                    self.merger.add_scores(message)
                    continue
                first = not self.merger.tokens
                tokens, logprobs = self.merger.add(message)
                scores = self._scores() if first and tokens else None
                if message.finish_reason is not None:
                    last = message
                if last is not None and len(self.merger.tokens) >= last.index + len(last.token_ids):
                    params = published_params(last.kv_transfer_params, self.route.decode.register.peer_address)
                    yield TokenDelta(
                        tokens, logprobs, last.finish_reason, last.stop_token_id, self._details(), params, scores
                    )
                    return
                if tokens or message.stats is not None:
                    details = self._details() if message.stats is not None else None
                    yield TokenDelta(tokens, logprobs, details=details, prompt_logprobs=scores)
        finally:
            # A decode engine that is done has let go of the KV on the prefill engine; else that may wait for a reader.
            for stream in streams:
                self.connections.close(stream, keep=streams[-1].check.ended)

    def _open(self) -> list[EngineStream]:
        """Send the request to the engines of the route, at once."""
        request, route = self.request, self.route
        self._resumed = len(self.merger.tokens)
        generate = Generate(
            request_id=f"{request.request_id}-{uuid.uuid4().hex[:8]}",
            token_ids=request.token_ids + self.merger.tokens,
            prompt_len=len(request.token_ids),
            sampling=self._sampling(),
            time_left=max(0.0, self._seconds_left()),
            cache_salt=request.cache_salt,
            grammar=request.grammar,
        )
        if route.prefill is None:
            return [self._send(generate, requested_kv(request.kv_transfer_params), route.decode)]
        source = route.prefill.register
        pull = PullKv(source.identity.engine_id, source.identity.incarnation, source.peer_address, generate.request_id)
        prefill = self._send(generate, Prefill(), route.prefill, route.prompt_tokens)
        return [prefill, self._send(generate, pull, route.decode)]

    def _sampling(self) -> SamplingParams:
        """Return the request's sampling, less the prompt's log-probabilities if the client has them already."""
        sampling = self.request.sampling
        return msgspec.structs.replace(sampling, prompt_logprobs=None) if self.merger.tokens else sampling

    def _send(
        self, generate: Generate, kv: Local | Prefill | PullKv, engine: EngineEntry, prompt_tokens: int = 0
    ) -> EngineStream:
        return self.connections.open(msgspec.structs.replace(generate, kv=kv), engine, self._queue, prompt_tokens)

    async def _receive(self) -> Tokens | PromptScores:
        """Return the next message of either engine. Raises the RequestError that ends the attempt."""
        while True:
            if self._prefill_error is not None and (self.merger.has_gap or self._awaits_first_token):
                raise self._prefill_error  # the first token was its to send; the decode engine had it from its KV
            try:
                async with asyncio.timeout(self._seconds_left() + GRACE_SECONDS):
                    stream, message = await self._queue.get()
            except TimeoutError:
                raise TimedOut(f"the request did not end in {self.timeout:.0f} s") from None
            if isinstance(message, PromptScores):
                return message
            if isinstance(message, Tokens):
                if message.stats is not None:
                    self._stats[stream.engine.incarnation] = message.stats
                if not stream.check.is_copy(message):
                    return message
                self._awaits_first_token = True
                continue
            if isinstance(message, Stalled):
                if not self.other_route():
                    continue  # it may go on after all, and before it ends itself
                message = EngineLost(message.reason)
            message.engine = stream.engine.incarnation
            if isinstance(message, EngineLost):
                self.lost.add(message.engine)
            if stream.engine is self.route.decode or not isinstance(message, EngineFailed):
                raise message
            log.warning("request %s: %s; the decode engine goes on alone", self.request.request_id, message)
            self._prefill_error = message

    def _scores(self) -> list[TokenLogprobs] | None:
        """Return the prompt's log-probabilities, all of which come before the first token. Raises EngineFailed."""
        if self.request.sampling.prompt_logprobs is None:
            return None
        found, wanted = self.merger.prompt_logprobs, len(self.request.token_ids) - 1
        if len(found) != wanted:
            raise EngineFailed(f"of {wanted} log-probabilities of the prompt only {len(found)} came before its answer")
        return found

    def _seconds_left(self) -> float:
        return self.merger.started + self.timeout - time.monotonic()

    def _details(self) -> ServingDetails:
        ttft = self.merger.first_token_at - self.merger.started
        one_token = len(self.merger.tokens) == self._resumed + 1
        return serving_details(self.route, self._stats, ttft, self.number, one_token=one_token)
