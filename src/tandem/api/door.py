"""The budget at the door: what open requests may take together, and each client of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from tandem.api.http_errors import TooManyRequests
from tandem.config_limits import LimitsSection
from tandem.errors import Overloaded


class Door:
    """Counts open requests, the bytes of their bodies, and their choices. Whatever a request took goes with it."""

    def __init__(self, limits: LimitsSection) -> None:
        self.limits = limits
        self._requests: Counter[str] = Counter()
        self._bytes = 0
        self._choices = 0

    @property
    def open_requests(self) -> int:
        return self._requests.total()

    @contextmanager
    def request(self, client: str) -> Iterator[Admission]:
        """Let in one request of `client` until the block ends. Raises Overloaded or TooManyRequests."""
        limits = self.limits
        if self._requests.total() >= limits.max_requests:
            raise Overloaded(f"{limits.max_requests} requests are open, which is --max-requests; try again later")
        if self._requests[client] >= (limits.max_client_requests or limits.max_requests):
            raise TooManyRequests(
                f"this client has {self._requests[client]} open requests, which is --max-client-requests; wait for"
                " one of them to end"
            )
        self._requests[client] += 1
        admission = Admission(self)
        try:
            yield admission
        finally:
            self._bytes -= admission.bytes
            self._choices -= admission.choices
            self._requests[client] -= 1
            if not self._requests[client]:
                del self._requests[client]

    def take_bytes(self, count: int) -> None:
        if self._bytes + count > self.limits.max_body_memory:
            raise Overloaded(
                f"the bodies of open requests have {self._bytes} bytes, and --max-body-memory is"
                f" {self.limits.max_body_memory}; try again later"
            )
        self._bytes += count

    def take_choices(self, count: int) -> None:
        if self._choices + count > self.limits.max_open_choices:
            raise Overloaded(
                f"open requests have {self._choices} choices, this one has {count}, and --max-open-choices is"
                f" {self.limits.max_open_choices}; try again later"
            )
        self._choices += count


class Admission:
    """What one request has taken.

    Attributes:
        bytes: of its body, as long as it is open, since its text and token ids live as long.
        choices: prompts times n.
    """

    def __init__(self, door: Door) -> None:
        self._door = door
        self.bytes = 0
        self.choices = 0

    def take_bytes(self, count: int) -> None:
        """Raises Overloaded."""
        self._door.take_bytes(count)
        self.bytes += count

    def take_choices(self, count: int) -> None:
        """Raises Overloaded."""
        self._door.take_choices(count)
        self.choices += count
