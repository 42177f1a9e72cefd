"""What the nodes tell each other through the store in which they met: it needs no connection but those to node 0."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import msgspec
from torch import distributed as dist

from tandem.errors import StartError

LAST_WORD_SECONDS = 5.0
STEP_SECONDS = 1.0

T = TypeVar("T", bound=msgspec.Struct)


class Board:
    """
    Args:
        store: a torch.distributed store; only one thread at a time may use this.

    All methods raise StartError when the store, which is on node 0, is lost.
    """

    def __init__(self, store: Any, own: int, nodes: int) -> None:
        self._store = store
        self._own = own
        self._nodes = nodes

    def put(self, key: str, value: msgspec.Struct) -> None:
        self._call(lambda: self._store.set(key, msgspec.json.encode(value).decode()))

    def get(self, key: str, kind: type[T], seconds: float) -> T | None:
        """None if nobody puts it there in time."""
        deadline = time.monotonic() + seconds
        while True:
            if self._wait(key):
                return msgspec.json.decode(self._call(lambda: self._store.get(key)), type=kind)
            if time.monotonic() > deadline:
                return None

    def get_while(self, key: str, kind: type[T], seconds: float, meanwhile: Callable[[], None]) -> T | None:
        """As `get`, calling `meanwhile` over and over until it returns."""
        found: list[T | StartError | None] = []
        over = threading.Event()

        def body() -> None:
            try:
                found.append(self.get(key, kind, seconds))
            except StartError as error:
                found.append(error)
            finally:
                over.set()

        threading.Thread(target=body, name=f"wait for {key}", daemon=True).start()
        while not over.is_set():
            meanwhile()
        if isinstance(found[0], StartError):
            raise found[0]
        return found[0]

    def exchange(self, topic: str, value: T, seconds: float) -> list[T]:
        """Everybody's value, by node. Raises StartError naming a node whose value is not there in time."""
        self.put(f"{topic}/{self._own}", value)
        deadline = time.monotonic() + seconds
        gathered = []
        for node in range(self._nodes):
            got = self.get(f"{topic}/{node}", type(value), deadline - time.monotonic())
            if got is None:
                raise StartError(f"node {node} fell silent after all had met ({topic}); look at what it printed")
            gathered.append(got)
        return gathered

    def part(self) -> None:
        """Wait, on node 0, until all have read everything: the store ends with this process. Bounded."""
        self._call(lambda: self._store.add("parted", 1))
        deadline = time.monotonic() + LAST_WORD_SECONDS
        while self._own == 0 and time.monotonic() < deadline and self._store.add("parted", 0) < self._nodes:
            time.sleep(0.02)

    def _wait(self, key: str) -> bool:
        def wait() -> bool:
            try:
                self._store.wait([key], timedelta(seconds=STEP_SECONDS))
            except dist.DistStoreError:
                return False
            return True

        return bool(self._call(wait))

    @staticmethod
    def _call(action: Callable[[], Any]) -> Any:
        try:
            return action()
        except RuntimeError as error:
            raise StartError(f"node 0 was lost during the check: {str(error).splitlines()[0][:200]}") from None
