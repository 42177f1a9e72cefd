"""A thread with an asyncio event loop beside the step loop; neither survives the other."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

from tandem.engine.mailbox import Mailbox
from tandem.engine.step_commands import Command, Fail, Shutdown
from tandem.engine.timeouts import EVENT_LOOP_SECONDS, STUCK_SECONDS
from tandem.errors import EngineFailed

log = logging.getLogger(__name__)

Main = Callable[[Callable[[], None], "asyncio.Future[str]"], Coroutine[Any, Any, None]]
"""Takes a function to call when everything is ready, and a future that has the reason once the thread is to end."""


class EventLoopThread:
    """Runs `main` until `stop`. If it fails, the step loop is told to; if that hangs, the process is ended.

    Args:
        mailbox: of the step loop.
        end_process: ends this process with the error.
    """

    def __init__(self, main: Main, mailbox: Mailbox[Command], end_process: Callable[[EngineFailed], None]) -> None:
        self._main = main
        self._mailbox = mailbox
        self._end_process = end_process
        self._loop = asyncio.new_event_loop()
        self._stopping: asyncio.Future[str] = self._loop.create_future()
        self._ready = threading.Event()
        self._step_loop_ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="event-loop", daemon=True)

    def start(self, check_ranks: Callable[[], object], seconds: float) -> None:
        """Return once `main` is ready.

        Args:
            check_ranks: raises EngineFailed when a rank is lost; called again and again meanwhile.

        Raises:
            EngineFailed: a rank was lost, or `main` is not ready in time.
        """
        self._thread.start()
        deadline = time.monotonic() + seconds
        while not self._ready.wait(0.1):
            check_ranks()
            if not self._thread.is_alive():
                raise RuntimeError("the event loop did not start")
            if time.monotonic() > deadline:
                raise EngineFailed(f"the transfer threads of the ranks were not ready within {seconds:.0f} s")

    def call(self, action: Callable[[], object]) -> None:
        """Run `action` in the thread, after what was given before; nothing happens if the thread has ended."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(action)

    def stop(self, reason: str) -> None:
        """End the thread; the step loop has ended. Bounded."""

        def ask() -> None:
            if not self._stopping.done():
                self._stopping.set_result(reason)

        self._step_loop_ended.set()
        self.call(ask)
        self._thread.join(EVENT_LOOP_SECONDS)

    # --- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._main(self._ready.set, self._stopping))
            self._mailbox.put(Shutdown("the event loop has ended"))
        except EngineFailed as error:
            self._fail(error)
        except BaseException as error:
            log.exception("the leader's event loop died")
            self._fail(EngineFailed(f"the event loop died: {error}"))
        finally:
            self._loop.close()

    def _fail(self, error: EngineFailed) -> None:
        self._mailbox.put(Fail(error))
        if not self._step_loop_ended.wait(STUCK_SECONDS):
            self._end_process(error)
