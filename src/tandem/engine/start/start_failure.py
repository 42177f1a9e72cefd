"""While an engine starts, a rank that fails ends the others too and tells them why.

Without it they would wait in a collective until that times out, each with an error of its own.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType

import msgspec

from tandem.engine.store import Store, first_line, wait_for_count
from tandem.engine.timeouts import CAUSE_SECONDS, LAST_WORD_SECONDS
from tandem.errors import RankLost, StartError, TandemError
from tandem.reports import ErrorReport, error_report

log = logging.getLogger(__name__)

POLL_SECONDS = 0.25


class StartFailureWatch:
    """Watches the store for the failure of another rank, in a thread of its own, and reports this rank's.

    As a context manager it lasts until `end` is called: an error that leaves the body earlier is this rank's failure.

    Args:
        store: a connection of its own to the store in which the ranks met.
        rank: this rank; rank 0's process serves the store.
        on_failure: called in the thread of this object with the error to end with, when another rank has failed.
    """

    def __init__(self, store: Store, rank: int, world_size: int, on_failure: Callable[[TandemError], None]) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._on_failure = on_failure
        self._over = threading.Event()
        self._counted = False
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, name="start failure watch", daemon=True).start()

    def __enter__(self) -> StartFailureWatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not self._over.is_set():
            if isinstance(error, RankLost):  # if that rank said why, this process is ended meanwhile
                time.sleep(CAUSE_SECONDS)
            self.fail(error)
        self.end()

    def end(self) -> None:
        """The start is over: from now on ranks end each other by other means."""
        self._over.set()

    def fail(self, error: Exception) -> None:
        """Tell the other ranks. Returns once this process may end: on rank 0, when all of them have heard; bounded."""
        self._over.set()
        if not self._lock.acquire(timeout=LAST_WORD_SECONDS):
            return  # the watching thread waits for a store that does not answer
        try:
            # The first failure stays: what follows are its consequences.
            self._store.compare_set("failure", "", msgspec.json.encode(self._failure(error)).decode())
            self._count()
            if self._rank == 0:
                wait_for_count(self._store, "failure heard", self._world_size)
        except RuntimeError as lost:
            log.info("the other ranks cannot be told: %s", first_line(lost))  # the rank that serves the store is gone
        finally:
            self._lock.release()

    def _failure(self, error: Exception) -> ErrorReport:
        report = error_report(error)
        text = report.text if isinstance(error, TandemError) else f"{type(error).__name__}: {report.text}"
        return ErrorReport(f"rank {self._rank} on {socket.gethostname()}: {text}", report.is_root_cause)

    def _count(self) -> None:
        if not self._counted:
            self._counted = True
            self._store.add("failure heard", 1)

    def _watch(self) -> None:
        while not self._over.wait(POLL_SECONDS):
            try:
                with self._lock:
                    failure = self._others_failure()
            except RuntimeError:
                failure = RankLost("node 0 was lost while the engine started; see its log")
            if failure is not None and not self._over.is_set():
                self._on_failure(failure)
                return

    def _others_failure(self) -> TandemError | None:
        if not self._store.check(["failure"]):
            return None
        self._count()
        failure = msgspec.json.decode(self._store.get("failure"), type=ErrorReport)
        return StartError(failure.text) if failure.is_root_cause else RankLost(failure.text)
