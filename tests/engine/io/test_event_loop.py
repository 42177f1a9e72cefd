"""How the leader's event loop starts and ends beside a step loop; what it does in between is played."""

from __future__ import annotations

import asyncio
import queue

import pytest

from tandem.engine import commands
from tandem.engine.commands import Command
from tandem.engine.io.event_loop import LeaderEventLoop
from tandem.engine.mailbox import Mailbox
from tandem.errors import EngineFailed

SECONDS = 10


class Played(LeaderEventLoop):
    """Waits for ever to be ready, or fails."""

    def __init__(self, failure: EngineFailed | None = None) -> None:
        self.mailbox: Mailbox[Command] = Mailbox()
        self.ended: queue.SimpleQueue[str] = queue.SimpleQueue()
        super().__init__(None, self.mailbox, self.ended.put)  # type: ignore[arg-type]
        self._failure = failure

    async def _run(self) -> None:
        self._stopping = asyncio.Event()
        if self._failure is not None:
            self._started.set()
            raise self._failure
        await self._stopping.wait()


def test_a_rank_that_is_lost_before_all_are_ready_ends_the_start() -> None:
    board = Played()

    def lost() -> None:
        raise EngineFailed("rank 1 of this engine was lost")

    with pytest.raises(EngineFailed, match="rank 1 of this engine was lost"):
        board.start(lost, SECONDS)
    board.stop("it failed")


def test_ranks_that_are_never_ready_end_the_start_at_the_deadline() -> None:
    board = Played()
    with pytest.raises(EngineFailed, match="were not ready within 0 s"):
        board.start(lambda: None, 0.2)
    board.stop("it failed")


def test_a_step_loop_that_hangs_does_not_keep_a_failed_engine_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "STUCK_SECONDS", 0.1)
    board = Played(EngineFailed("rank 1 of this engine was lost"))
    board.start(lambda: None, SECONDS)
    assert board.ended.get(timeout=SECONDS) == "rank 1 of this engine was lost"
    assert board.mailbox.wait(SECONDS) == commands.Shutdown("rank 1 of this engine was lost", failed=True)


def test_a_step_loop_that_obeys_ends_by_itself() -> None:
    board = Played(EngineFailed("rank 1 of this engine was lost"))
    board.start(lambda: None, SECONDS)
    assert board.mailbox.wait(SECONDS) == commands.Shutdown("rank 1 of this engine was lost", failed=True)
    board.stop("rank 1 of this engine was lost")
    assert not board._thread.is_alive()
    assert board.ended.empty()
