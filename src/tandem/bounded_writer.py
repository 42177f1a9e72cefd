"""Writes to a stream that may be read too slowly, or by nobody, without ever waiting for it."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

CAPACITY = 1 << 20


class BoundedWriter:
    """A text stream before another one: `write` returns at once, and a thread of its own passes the text on.

    What does not fit is dropped, and counted in the stream where it is missing. An error of the stream (a full disk, a
    reader that has gone) loses text and hurts nobody.

    Args:
        stream: where the text goes.
        capacity: characters that may wait.
    """

    def __init__(self, stream: TextIO, capacity: int = CAPACITY) -> None:
        self._stream = stream
        self._capacity = capacity
        self._waiting: deque[str] = deque()
        self._size = 0
        self._dropped = 0
        self._writing = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def write(self, text: str) -> int:
        """Take a text, or drop it; return its length."""
        with self._changed:
            if self._size + len(text) > self._capacity:
                self._dropped += max(1, text.count("\n"))
                return len(text)
            self._note_dropped()
            self._append(text)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="output", daemon=True)
                self._thread.start()
        return len(text)

    def flush(self) -> None:
        """Do nothing: the thread passes on what there is."""

    def drain(self, seconds: float) -> bool:
        """Wait until everything is passed on; return False if it still is not after `seconds`."""
        deadline = time.monotonic() + seconds
        with self._changed:
            self._note_dropped()
            return self._changed.wait_for(
                lambda: not self._waiting and not self._writing, max(0.0, deadline - time.monotonic())
            )

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:
        return self._stream.encoding

    def _append(self, text: str) -> None:
        self._waiting.append(text)
        self._size += len(text)
        self._changed.notify_all()

    def _note_dropped(self) -> None:
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            self._append(f"[{dropped} lines dropped: this output is read too slowly]\n")

    # --- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        put = _sink(self._stream)
        while True:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: bool(self._waiting))
                text = "".join(self._waiting)
                self._waiting.clear()
                self._size = 0
                self._writing = True
            try:
                put(text)
            except (OSError, ValueError):  # ValueError: the stream is closed
                continue


def _sink(stream: TextIO) -> Callable[[str], None]:
    """Return what writes to a stream: by its file descriptor, if it has one.

    A stream that the interpreter still holds at its end must not be locked by a thread that waits for a reader.
    """
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError, AttributeError):

        def put(text: str) -> None:
            stream.write(text)
            stream.flush()

        return put

    def put_bytes(text: str) -> None:
        data = memoryview(text.encode(errors="replace"))
        while data:
            data = data[os.write(descriptor, data) :]

    return put_bytes
