"""Decides whether a request that failed is tried again. Pure."""

from __future__ import annotations

from collections.abc import Callable

from tandem.errors import Diverged, Draining, EngineFailed, EngineLeft, EngineLost, KvRetry, Overloaded, RequestError

RETRIED = (EngineFailed, KvRetry, Overloaded, Draining)
"""What another engine may do better. Every other error is the request's own, and stays so wherever it is tried."""
GONE = (EngineLost, EngineLeft, Draining)
"""An engine that is not there, or not for long: another one, or the same one later, takes the request."""
MAX_ATTEMPTS = 3
MAX_DEADLY_ATTEMPTS = 2


class Retries:
    """The attempts at one request that have failed.

    An engine that was stopped in good order, or whose connection broke and came back, says nothing about the request,
    which goes on as often as that happens before its deadline. An engine that died may have died of the request: so
    it is tried once more, and not again.

    Args:
        is_there: whether an incarnation of an engine is there now.

    Attributes:
        exclude: incarnations that had better not be used, because they failed this request.
    """

    def __init__(self, is_there: Callable[[str], bool]) -> None:
        self._is_there = is_there
        self._lost: list[frozenset[str]] = []
        self._failed = 0
        self.exclude: set[str] = set()

    def add(self, error: RequestError, lost: frozenset[str], at_fault: str) -> None:
        """Count an attempt that failed. Raises its error if there is to be no other.

        Args:
            lost: incarnations that were lost during it.
            at_fault: incarnation of the engine that it failed on.
        """
        self._lost = [*(before - lost for before in self._lost), lost]  # one that was lost again had come back
        if not isinstance(error, GONE):
            self._failed += 1
        if self._failed >= MAX_ATTEMPTS:
            raise error
        if self._deadly >= MAX_DEADLY_ATTEMPTS:
            raise EngineFailed(f"engines were lost in {self._deadly} attempts at this request; the last: {error}")
        if not isinstance(error, Diverged):  # with neither engine is anything wrong
            self.exclude.add(at_fault)

    @property
    def _deadly(self) -> int:
        """Number of attempts with an engine that has not come back."""
        return sum(any(not self._is_there(incarnation) for incarnation in lost) for lost in self._lost)
