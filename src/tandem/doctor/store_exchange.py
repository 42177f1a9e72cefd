"""Values that nodes exchange through the store in which they met: it needs no connection but those to node 0."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from tandem.engine.store import Store, first_line, wait_for_count
from tandem.errors import StartError

POLL_SECONDS = 0.02
"""Between two looks into the store; not shorter, since each delays the reads that are served meanwhile."""

T = TypeVar("T")


class StoreExchange:
    """Values by key, one writer for each; any type that msgspec can encode.

    All methods raise StartError when the store, which is on node 0, is lost.

    Args:
        own: the number of this node.
    """

    def __init__(self, store: Store, own: int, nodes: int) -> None:
        self._store = store
        self._nodes = nodes
        self.own = own

    def put(self, key: str, value: object) -> None:
        self._call(self._store.set, key, msgspec.json.encode(value).decode())

    def get(self, key: str, kind: type[T], seconds: float, meanwhile: Callable[[], None] | None = None) -> T | None:
        """Return the value, or None if nobody puts it there in time; call `meanwhile` over and over until then."""
        deadline = time.monotonic() + seconds
        while not self._call(self._store.check, [key]):
            if time.monotonic() > deadline:
                return None
            next_look = time.monotonic() + POLL_SECONDS
            while time.monotonic() < next_look:
                meanwhile() if meanwhile is not None else time.sleep(POLL_SECONDS)
        return msgspec.json.decode(self._call(self._store.get, key), type=kind)

    def gather(self, topic: str, value: object, kind: type[T], seconds: float) -> list[T]:
        """Return the values of all nodes, by node. Raises StartError that names a node whose value does not come."""
        self.put(f"{topic}/{self.own}", value)
        deadline = time.monotonic() + seconds
        gathered = []
        for node in range(self._nodes):
            found = self.get(f"{topic}/{node}", kind, deadline - time.monotonic())
            if found is None:
                raise StartError(f"node {node} fell silent after all had met ({topic}); look at what it printed")
            gathered.append(found)
        return gathered

    def finish(self) -> None:
        """Wait, on node 0, until all have read everything: the store ends with this process. Bounded."""
        self._call(self._store.add, "finished", 1)
        if self.own == 0:
            self._call(wait_for_count, self._store, "finished", self._nodes)

    @staticmethod
    def _call(method: Callable[..., Any], *arguments: object) -> Any:
        try:
            return method(*arguments)
        except RuntimeError as error:
            raise StartError(f"node 0 was lost during the check: {first_line(error)}") from None
