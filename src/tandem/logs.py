"""Sets up log lines: time, level, process (engine and rank, or router), text. A reader that is slow stops nobody."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Hashable
from dataclasses import dataclass

STDERR = 2
MOST_LINES = 20
MOST_INFO_LINES = 500
STRETCH_SECONDS = 10.0
"""So many lines of one kind are written in so long, from warnings on and below: a flood of whatever clients or engines
send is no flood of lines."""


def set_up(process: str, level: str) -> None:
    """Log to stderr; `process` names this process."""
    logging.basicConfig(
        level=level.upper(),
        handlers=[DescriptorHandler(STDERR)],
        format=f"%(asctime)s %(levelname).1s [{process}] %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    for noisy in ("asyncio", "uvicorn.error", "uvicorn", "httpx"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))


class DescriptorHandler(logging.Handler):
    """Writes each record to a file descriptor with one call, and drops it where that would have to wait.

    Every process of ours logs from its event loop or step loop, which must not stand still because nobody reads what
    it says. That needs a descriptor that does not block (processes.py makes it so); lines up to PIPE_BUF (4,096 bytes)
    are then written whole or not at all.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._warnings = LogBound(MOST_LINES, STRETCH_SECONDS)
        self._infos = LogBound(MOST_INFO_LINES, STRETCH_SECONDS)
        self._dropped = 0
        self._broken = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, unless there are too many of its kind, and before it how many others were left out."""
        now = time.monotonic()
        if left_out := self._warnings.ended(now) + self._infos.ended(now):
            self._write(self._notice(record, f"{left_out} log lines left out: there were too many of their kind"))
        bound = self._warnings if record.levelno >= logging.WARNING else self._infos
        if not bound.admit((record.name, record.msg), now):
            return
        try:
            line = self.format(record)
        except Exception:
            self.handleError(record)
            return
        if self._dropped:
            line = f"{self._notice(record, f'{self._dropped} log lines dropped: they are read too slowly')}\n{line}"
        self._dropped = 0 if self._write(line) else self._dropped + 1

    def _notice(self, record: logging.LogRecord, text: str) -> str:
        return self.format(logging.LogRecord(record.name, logging.WARNING, record.pathname, 0, text, None, None))

    def _write(self, line: str) -> bool:
        """Return whether the line was written, if only in part."""
        data = f"{line}\n".encode(errors="replace")
        if self._broken:
            data = b"\n" + data
        try:
            written = os.write(self._descriptor, data)
        except BlockingIOError:
            return False
        except OSError:  # a full disk, or a reader that is gone
            return True
        self._broken = written < len(data)
        return True


@dataclass(slots=True)
class _Window:
    """Since `begun`: lines that were admitted, and those that were left out."""

    begun: float
    admitted: int = 0
    left_out: int = 0


class LogBound:
    """Admits so many lines of each kind in each stretch of time, and counts the others. Pure; time is passed in.

    Args:
        most: lines of a kind.
        seconds: from the first of them; then the next stretch begins.
    """

    def __init__(self, most: int, seconds: float) -> None:
        self._most = most
        self._seconds = seconds
        self._windows: dict[Hashable, _Window] = {}

    def admit(self, kind: Hashable, now: float) -> bool:
        """Return whether a line of this kind may be logged now."""
        window = self._windows.setdefault(kind, _Window(now))
        if window.admitted < self._most:
            window.admitted += 1
            return True
        window.left_out += 1
        return False

    def ended(self, now: float) -> int:
        """Return how many lines were left out in stretches that are over, and have not been told yet."""
        over = [kind for kind, window in self._windows.items() if now - window.begun >= self._seconds]
        return sum(self._windows.pop(kind).left_out for kind in over)


def _is_news(record: logging.LogRecord) -> bool:
    """Return False for a request that is cancelled because the server stops: it is not worth a traceback."""
    kind = record.exc_info[0] if record.exc_info else None
    return kind is None or not issubclass(kind, asyncio.CancelledError)
