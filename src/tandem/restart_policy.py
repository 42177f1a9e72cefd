"""When what has died is started anew, and when it no longer is. Pure: times in, decisions out."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

MOST = 5
WITHIN_SECONDS = 300.0
FIRST_DELAY = 1.0
LONGEST_DELAY = 30.0


@dataclass(frozen=True, slots=True)
class RestartAt:
    """Start it anew at this time."""

    time: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """It has died too often: `deaths` times within `seconds`."""

    deaths: int
    seconds: float


class RestartPolicy:
    """Restarts of one engine or router.

    The first death is an accident: it is started anew at once. A further one within `within` seconds waits
    `first_delay`, the next one twice as long, up to `longest_delay`. More than `most` in that time are no accidents.
    """

    def __init__(
        self,
        most: int = MOST,
        within: float = WITHIN_SECONDS,
        first_delay: float = FIRST_DELAY,
        longest_delay: float = LONGEST_DELAY,
    ) -> None:
        self._most = most
        self._within = within
        self._first_delay = first_delay
        self._longest_delay = longest_delay
        self._deaths: deque[float] = deque()

    def died(self, now: float) -> RestartAt | GiveUp:
        """Return what to do about a death at `now`; also about a start that failed."""
        while self._deaths and now - self._deaths[0] >= self._within:
            self._deaths.popleft()
        self._deaths.append(now)
        earlier = len(self._deaths) - 1
        if earlier >= self._most:
            return GiveUp(len(self._deaths), now - self._deaths[0])
        delay = min(self._longest_delay, self._first_delay * 2.0 ** (earlier - 1)) if earlier else 0.0
        return RestartAt(now + delay)
