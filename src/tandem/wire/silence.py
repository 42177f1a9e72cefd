"""Notices that others have fallen silent, and does not take a pause of this process for their silence. Pure."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

Who = TypeVar("Who", bound=Hashable)


class Silence(Generic[Who]):
    """Silence of those who were heard at least once; time is passed in.

    A process that was stopped (SIGSTOP, a laptop's lid, a virtual machine that migrates) finds nothing new from anybody
    when it goes on, though all are there. So time for which it did not look counts as nobody's silence.

    Args:
        patience: seconds of silence after which somebody counts as lost.
        interval: seconds from one `look` to the next; a look that comes an interval late or more was kept from coming.
    """

    def __init__(self, patience: float, interval: float) -> None:
        self._patience = patience
        self._interval = interval
        self._heard: dict[Who, float] = {}
        self._looked: float | None = None

    def __len__(self) -> int:
        return len(self._heard)

    def heard(self, who: Who, now: float) -> None:
        """Note that somebody is there."""
        self._heard[who] = now

    def look(self, now: float) -> list[Who]:
        """Return those who have been silent for longer than `patience`."""
        if self._looked is not None and now - self._looked >= 2 * self._interval:
            kept = now - self._looked - self._interval
            self._heard = {who: min(now, heard + kept) for who, heard in self._heard.items()}
        self._looked = now
        return [who for who, heard in self._heard.items() if now - heard > self._patience]
