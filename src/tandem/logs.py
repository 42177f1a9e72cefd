"""How log lines look: time, level, who (engine and rank, or router), text."""

from __future__ import annotations

import logging


def set_up(who: str, level: str) -> None:
    """Log to stderr; `who` names this process."""
    logging.basicConfig(
        level=level.upper(),
        format=f"%(asctime)s %(levelname).1s [{who}] %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    for noisy in ("asyncio", "uvicorn.error", "uvicorn", "httpx"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))
