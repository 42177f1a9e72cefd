"""Work on text that takes long, off the event loop: a few threads, and a queue that has an end."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from tandem.errors import Overloaded

THREADS = min(2, os.cpu_count() or 1)
MAX_JOBS = 1024

P = ParamSpec("P")
T = TypeVar("T")


class TextPool:
    """Runs jobs of bounded length; a cancelled one that has not begun never does.

    Args:
        max_jobs: that may wait and run.
    """

    def __init__(self, max_jobs: int = MAX_JOBS) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="text")
        self._max_jobs = max_jobs
        self._jobs = 0

    async def run(self, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what `job` returns. Raises Overloaded where too many wait."""
        if self._jobs >= self._max_jobs:
            raise Overloaded(f"{self._jobs} texts are being worked on or wait for it; try again later")
        self._jobs += 1
        try:
            return await asyncio.wrap_future(self._threads.submit(job, *args, **kwargs))
        finally:
            self._jobs -= 1
