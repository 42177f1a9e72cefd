"""Sets up log lines: time, level, process (engine and rank, or router), text. A reader that is slow stops nobody."""

from __future__ import annotations

import asyncio
import logging
import os

STDERR = 2


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
        self._dropped = 0
        self._broken = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, and before it how many were dropped since the last one that was written."""
        try:
            line = self.format(record)
        except Exception:
            self.handleError(record)
            return
        if self._dropped:
            line = f"{self._notice(record)}\n{line}"
        self._dropped = 0 if self._write(line) else self._dropped + 1

    def _notice(self, record: logging.LogRecord) -> str:
        text = f"{self._dropped} log lines dropped: they are read too slowly"
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


def _is_news(record: logging.LogRecord) -> bool:
    """Return False for a request that is cancelled because the server stops: it is not worth a traceback."""
    kind = record.exc_info[0] if record.exc_info else None
    return kind is None or not issubclass(kind, asyncio.CancelledError)
