"""Running a job: its sequences' pieces, as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from tandem.api.backend import Backend
from tandem.api.metrics import Observation
from tandem.api.output import TextChunk
from tandem.api.prepared_request import PreparedRequest, Sequence
from tandem.errors import EngineFailed

MAX_WAITING_PIECES = 256


async def generate(backend: Backend, job: PreparedRequest, observation: Observation) -> AsyncGenerator[TextChunk, None]:
    """Pieces of all choices, each choice's in order. Closing it aborts whatever still runs. Raises RequestError."""
    runs = [_run(backend, one, job.wants_tokens, observation) for one in job.sequences]
    async with aclosing(runs[0] if len(runs) == 1 else _merged(runs)) as pieces:
        async for piece in pieces:
            yield piece


async def _run(
    backend: Backend, sequence: Sequence, wants_tokens: bool, observation: Observation
) -> AsyncGenerator[TextChunk, None]:
    """One sequence, until its finish or a stop string; then the backend's generator is closed, which aborts it."""
    clock = observation.clock()
    async with aclosing(backend.generate(sequence.request)) as deltas:
        async for delta in deltas:
            piece = sequence.output.feed(delta)
            clock.tokens(len(piece.tokens))
            if piece.text or piece.finish_reason is not None or (wants_tokens and piece.tokens):
                yield piece
            if piece.finish_reason is not None:
                return
    raise EngineFailed("the engine stopped sending tokens and gave no reason")


async def _merged(runs: list[AsyncGenerator[TextChunk, None]]) -> AsyncGenerator[TextChunk, None]:
    """Pieces of several sequences as they come; the first error ends them all."""
    queue: asyncio.Queue[TextChunk | BaseException | None] = asyncio.Queue(MAX_WAITING_PIECES)
    tasks = [asyncio.create_task(_pump(run, queue)) for run in runs]
    left = len(tasks)
    try:
        while left:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(run: AsyncGenerator[TextChunk, None], queue: asyncio.Queue[TextChunk | BaseException | None]) -> None:
    try:
        async with aclosing(run) as pieces:
            async for piece in pieces:
                await queue.put(piece)
        await queue.put(None)
    except Exception as error:  # it is raised again where the pieces are read
        await queue.put(error)
