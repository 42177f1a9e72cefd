"""How long the step that runs now has run, for the threads beside the step loop."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(slots=True)
class StepClock:
    """Written by the step loop alone, and read by other threads without waiting for it: it may hang.

    Attributes:
        since: when the oldest batch in flight was handed to the ranks, or the step loop began to look for one; None
            while it waits for something to do.
    """

    since: float | None = None

    def seconds(self) -> float:
        """Return the age of the running step; 0 without one."""
        since = self.since
        return 0.0 if since is None else max(0.0, time.monotonic() - since)
