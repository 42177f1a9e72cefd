"""Hands objects from other threads to the step loop, which can wait for them together with sockets."""

from __future__ import annotations

import contextlib
import os
import socket
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Many writers, one reader. Readable (`fileno`) while something may be in it."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def fileno(self) -> int:
        return self._reader.fileno()

    def put(self, item: T) -> None:
        self._items.append(item)
        with contextlib.suppress(BlockingIOError):  # full of wake-ups already
            os.write(self._writer.fileno(), b"\0")

    def take(self) -> list[T]:
        """Return everything that is there, without waiting."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self._reader.fileno(), 4096):
                pass
        items = []
        while self._items:
            items.append(self._items.popleft())
        return items

    def close(self) -> None:
        self._reader.close()
        self._writer.close()
