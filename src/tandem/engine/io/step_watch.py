"""The watchdog of the step loop, in the event loop beside it."""

from __future__ import annotations

import asyncio
import time

from tandem.engine.step_clock import StepClock
from tandem.errors import EngineFailed

LOOKS = 20
"""Times that it looks at the clock within the timeout."""
MAX_LOOK_SECONDS = 1.0


class StepWatch:
    """Ends the engine when a step hangs: in a kernel, a driver, or a collective with a rank that does not answer.

    Args:
        timeout: seconds, --step-timeout.
    """

    def __init__(self, clock: StepClock, timeout: float) -> None:
        self._clock = clock
        self._timeout = timeout
        self._watched: float | None = None
        self._asleep = 0.0

    @property
    def seconds(self) -> float:
        """Age of the running step, less the time for which this process was stopped as a whole; 0 without one."""
        asleep = self._asleep if self._clock.since == self._watched else 0.0
        return max(0.0, self._clock.seconds() - asleep)

    async def run(self) -> None:
        """Raise EngineFailed when a step has run for too long."""
        look = min(MAX_LOOK_SECONDS, self._timeout / LOOKS)
        while True:
            before = time.monotonic()
            await asyncio.sleep(look)
            if self._clock.since != self._watched:
                self._watched, self._asleep = self._clock.since, 0.0
            self._asleep += max(0.0, time.monotonic() - before - 2 * look)
            if self.seconds > self._timeout:
                raise EngineFailed(
                    f"a step of this engine has run for {self.seconds:.0f} s and has not ended: a rank, a device or its"
                    f" driver hangs. If steps may take that long here, raise --step-timeout ({self._timeout:g} s)"
                )
