"""A target: a part of Tandem that takes input from outside, and the promises that it must keep whatever comes."""

from __future__ import annotations

import asyncio
import contextlib
import random
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from typing import Any

from tests.fuzz.fakes import Clock, OwnErrors


class Target(ABC):
    """One episode: a fresh receiver that is fed with some inputs, and then must be able to end well.

    Args:
        rng: everything that is done at random depends on it alone, so that its seed replays the episode.
        clock: the receiver's.
    """

    NAME: str
    INPUTS = 200
    """Inputs of one episode."""

    def __init__(self, rng: random.Random, clock: Clock, errors: OwnErrors) -> None:
        self.rng = rng
        self.clock = clock
        self.errors = errors
        self.last: Any = None
        self._tasks: list[asyncio.Task[Any]] = []

    async def begin(self) -> None:  # noqa: B027
        """Start the receiver."""

    @abstractmethod
    async def feed(self) -> None:
        """Make one input, keep it in `last`, and hand it over. Raises Defect, or what nobody has caught."""

    async def end(self) -> None:  # noqa: B027
        """Check what must be true once all is over. Raises Defect."""

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a part of the receiver; it must not end before the episode does."""
        task = asyncio.ensure_future(coroutine)
        self._tasks.append(task)
        return task

    def check(self) -> None:
        """Raise what has gone wrong so far."""
        self.errors.check()
        for task in self._tasks:
            if task.done():
                task.result()
                raise AssertionError("a listener has ended")

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*self._tasks, return_exceptions=True)
