"""Hands objects from other threads to the step loop, which can wait for them together with sockets."""

from __future__ import annotations

import os
import queue
import socket
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Many writers, one reader. Readable (`fileno`) while something may be in it."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[T] = queue.SimpleQueue()
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def fileno(self) -> int:
        return self._reader.fileno()

    def put(self, item: T) -> None:
        self._queue.put(item)
        try:
            os.write(self._writer.fileno(), b"\0")
        except BlockingIOError:
            pass  # full of wake-ups already

    def take(self) -> list[T]:
        """Return everything that is there, without waiting."""
        try:
            while os.read(self._reader.fileno(), 4096):
                pass
        except BlockingIOError:
            pass
        items = []
        while True:
            try:
                items.append(self._queue.get_nowait())
            except queue.Empty:
                return items

    def close(self) -> None:
        self._reader.close()
        self._writer.close()
