"""The thread beside the step loop starts, ends and fails in bounded time; what it runs is played."""

from __future__ import annotations

import asyncio
import queue
import select
import threading
from collections.abc import Callable

import pytest

from tandem.engine.io import event_loop_thread
from tandem.engine.io.event_loop_thread import EventLoopThread, Main
from tandem.engine.mailbox import Mailbox
from tandem.engine.step_commands import Command, Fail, Shutdown
from tandem.errors import EngineFailed, RankLost

SECONDS = 10
LOST = RankLost("rank 1 of this engine was lost")


async def never_ready(ready: Callable[[], None], stopping: asyncio.Future[str]) -> None:
    await stopping


async def fails_once_ready(ready: Callable[[], None], stopping: asyncio.Future[str]) -> None:
    ready()
    raise LOST


class Played:
    """A thread, the mailbox of a step loop that does nothing, and the errors that would end the process."""

    def __init__(self, main: Main) -> None:
        self.mailbox: Mailbox[Command] = Mailbox()
        self.ended: queue.SimpleQueue[EngineFailed] = queue.SimpleQueue()
        self.thread = EventLoopThread(main, self.mailbox, self.ended.put)

    def command(self) -> Command:
        assert select.select([self.mailbox], [], [], SECONDS)[0]
        [command] = self.mailbox.take()
        return command


def test_a_rank_that_is_lost_before_all_are_ready_ends_the_start() -> None:
    played = Played(never_ready)

    def lost() -> None:
        raise LOST

    with pytest.raises(RankLost, match="rank 1 of this engine was lost"):
        played.thread.start(lost, SECONDS)
    played.thread.stop("it failed")


def test_ranks_that_are_never_ready_end_the_start_at_the_deadline() -> None:
    played = Played(never_ready)
    with pytest.raises(EngineFailed, match="were not ready within 0 s"):
        played.thread.start(lambda: None, 0.2)
    played.thread.stop("it failed")


def test_calls_run_in_order_and_the_reason_of_the_end_arrives() -> None:
    seen: list[object] = []

    async def main(ready: Callable[[], None], stopping: asyncio.Future[str]) -> None:
        ready()
        seen.append(await stopping)

    played = Played(main)
    played.thread.call(lambda: seen.append("before the start"))
    played.thread.start(lambda: None, SECONDS)
    played.thread.call(lambda: seen.append("after it"))
    played.thread.stop("it was told to stop")
    assert seen == ["before the start", "after it", "it was told to stop"]
    assert played.command() == Shutdown("the event loop has ended")
    played.thread.call(lambda: seen.append("too late"))
    assert played.ended.empty()


def test_a_step_loop_that_hangs_does_not_keep_a_failed_engine_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_loop_thread, "STUCK_SECONDS", 0.1)
    played = Played(fails_once_ready)
    played.thread.start(lambda: None, SECONDS)
    assert played.ended.get(timeout=SECONDS) is LOST
    assert played.command() == Fail(LOST)


def test_a_step_loop_that_ends_when_told_to_ends_the_process_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_loop_thread, "STUCK_SECONDS", SECONDS)
    played = Played(fails_once_ready)
    played.thread.start(lambda: None, SECONDS)
    assert played.command() == Fail(LOST)
    played.thread.stop(str(LOST))
    assert not [thread for thread in threading.enumerate() if thread.name == "event_loop"]
    assert played.ended.empty()
