"""Calls of foreign code that keeps to no deadline of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def call_within(seconds: float, call: Callable[[], T], name: str) -> T:
    """Return what `call` returns, or raise what it raises.

    Args:
        name: of the daemon thread that makes the call.

    Raises:
        TimeoutError: it takes longer than `seconds`. It is then left behind in its thread.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future.result(seconds)
