"""Generate the sequences of a prepared request, and merge their text chunks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from tandem.api.backend import Backend
from tandem.api.metrics import RequestMetrics, TokenTimer
from tandem.api.output_processor import TextChunk
from tandem.api.prepared_request import PreparedRequest, PreparedSequence
from tandem.errors import EngineFailed

MAX_WAITING_CHUNKS = 256


def generate(backend: Backend, request: PreparedRequest, metrics: RequestMetrics) -> AsyncGenerator[TextChunk, None]:
    """Return the chunks of all choices, each choice's in order. Closing it aborts whatever still runs.

    Raises RequestError.
    """
    runs = [
        _generate_one(backend, one, request.wants_tokens, TokenTimer(metrics, len(one.prompt.token_ids)))
        for one in request.sequences
    ]
    return runs[0] if len(runs) == 1 else _merged(runs)


async def _generate_one(
    backend: Backend, sequence: PreparedSequence, wants_tokens: bool, timer: TokenTimer
) -> AsyncGenerator[TextChunk, None]:
    """Yield chunks until the finish or a stop string; then the backend's generator is closed, which aborts it."""
    ending = "abort"
    try:
        async with aclosing(backend.generate(sequence.request)) as deltas:
            async for delta in deltas:
                chunk = sequence.output.process(delta)
                timer.record(len(chunk.tokens))
                if chunk.finish_reason is not None:
                    ending = chunk.finish_reason
                says = chunk.text or chunk.finish_reason is not None or chunk.prompt_logprobs is not None
                if says or (wants_tokens and chunk.tokens):
                    yield chunk
                if chunk.finish_reason is not None:
                    return
        raise EngineFailed("the engine stopped sending tokens and gave no reason")
    except Exception:
        ending = "error"
        raise
    finally:
        timer.ended(ending, sequence.output.details)


async def _merged(runs: list[AsyncGenerator[TextChunk, None]]) -> AsyncGenerator[TextChunk, None]:
    """Yield chunks of several sequences as they come; the first error ends them all."""
    queue: asyncio.Queue[TextChunk | Exception | None] = asyncio.Queue(MAX_WAITING_CHUNKS)
    tasks = [asyncio.create_task(_forward(run, queue)) for run in runs]
    left = len(tasks)
    try:
        while left:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _forward(run: AsyncGenerator[TextChunk, None], queue: asyncio.Queue[TextChunk | Exception | None]) -> None:
    try:
        async with aclosing(run) as chunks:
            async for chunk in chunks:
                await queue.put(chunk)
        await queue.put(None)
    except Exception as error:  # it is raised again where the chunks are read
        await queue.put(error)
