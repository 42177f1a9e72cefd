"""Sets up log lines: time, level, process (engine and rank, or router), text."""

from __future__ import annotations

import asyncio
import logging


def set_up(process: str, level: str) -> None:
    """Log to stderr; `process` names this process."""
    logging.basicConfig(
        level=level.upper(),
        format=f"%(asctime)s %(levelname).1s [{process}] %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    for noisy in ("asyncio", "uvicorn.error", "uvicorn", "httpx"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))


def _is_news(record: logging.LogRecord) -> bool:
    """Return False for a request that is cancelled because the server stops: it is not worth a traceback."""
    kind = record.exc_info[0] if record.exc_info else None
    return kind is None or not issubclass(kind, asyncio.CancelledError)
