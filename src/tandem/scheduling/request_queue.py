"""A queue of the requests in one state, in the order of their arrival."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from tandem.scheduling.request import Request


def _order(request: Request) -> int:
    return request.order


class RequestQueue:
    """A sorted list: a request that returns after a preemption takes the place of its arrival, not the last one."""

    __slots__ = ("_requests",)

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        """Iterate over the requests that are queued now; the queue may change meanwhile."""
        return iter(self._requests.copy())

    def __reversed__(self) -> Iterator[Request]:
        return reversed(self._requests)

    @property
    def head(self) -> Request | None:
        return self._requests[0] if self._requests else None

    def add(self, request: Request) -> None:
        insort(self._requests, request, key=_order)

    def remove(self, request: Request) -> None:
        index = bisect_left(self._requests, request.order, key=_order)
        if index == len(self._requests) or self._requests[index] is not request:
            raise ValueError(f"request {request.request_id} is not in this queue")
        del self._requests[index]
