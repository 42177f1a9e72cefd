"""Spread work over the rounds of the event loop, so that thousands of requests at once do not stop all else."""

from __future__ import annotations

import asyncio
from collections import deque

PER_ROUND = 8


class Turnstile:
    """Lets `per_round` callers through in each round of the event loop, in the order in which they came."""

    def __init__(self, per_round: int = PER_ROUND) -> None:
        self._per_round = per_round
        self._passed = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def wait(self) -> None:
        """Wait for a turn."""
        loop = asyncio.get_running_loop()
        if self._passed < self._per_round and not self._waiting:
            if not self._passed:
                loop.call_soon(self._next_round)
            self._passed += 1
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _next_round(self) -> None:
        self._passed = 0
        while self._waiting and self._passed < self._per_round:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                self._passed += 1
        if self._passed:
            asyncio.get_running_loop().call_soon(self._next_round)
