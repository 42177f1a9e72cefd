"""The watchdog of the step loop: a step that hangs ends the engine, anything else does not."""

from __future__ import annotations

import asyncio
import time

import pytest

from tandem.engine.io.step_watch import StepWatch
from tandem.engine.step_clock import StepClock
from tandem.errors import EngineFailed

SECONDS = 20


def ends(watch: StepWatch) -> None:
    asyncio.run(asyncio.wait_for(watch.run(), SECONDS))


def test_a_step_that_hangs_ends_the_engine_and_names_the_flag() -> None:
    clock = StepClock(since=time.monotonic())
    with pytest.raises(EngineFailed, match=r"a step of this engine has run for .* raise --step-timeout \(0.2 s\)"):
        ends(StepWatch(clock, timeout=0.2))


def test_an_engine_that_waits_for_work_is_left_alone() -> None:
    async def play() -> None:
        clock = StepClock()
        watch = StepWatch(clock, timeout=0.05)
        running = asyncio.create_task(watch.run())
        await asyncio.sleep(0.5)
        assert not running.done()
        assert watch.seconds == 0.0
        clock.since = time.monotonic()
        with pytest.raises(EngineFailed):
            await running

    asyncio.run(asyncio.wait_for(play(), SECONDS))


def test_time_for_which_the_whole_process_was_stopped_is_no_time_of_the_step() -> None:
    async def play() -> None:
        clock = StepClock(since=time.monotonic())
        watch = StepWatch(clock, timeout=1.0)
        running = asyncio.create_task(watch.run())
        await asyncio.sleep(0.2)  # it has seen the step
        time.sleep(1.5)  # noqa: ASYNC251  # nothing runs in this process, as after SIGSTOP
        await asyncio.sleep(0.2)
        assert not running.done()
        assert 0.0 < watch.seconds < 1.0
        clock.since = None
        assert watch.seconds == 0.0
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(asyncio.wait_for(play(), SECONDS))
