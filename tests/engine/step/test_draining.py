"""An engine that drains takes nothing new, finishes what it has, and ends."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tandem.engine.step_commands import AbortRequest, Command, Drain, LeasesEnded
from tandem.errors import Draining
from tandem.scheduling.events import PrefillEnded
from tandem.wire.messages import Failed, Prefill, Tokens
from tests.engine.step.test_step_loop import SOURCE, Rig

SECONDS = 20.0


@pytest.fixture
def it() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.send(Drain(0.0))
    made.thread.join(SECONDS)
    assert not made.thread.is_alive()
    made.mailbox.close()


def later() -> float:
    return time.monotonic() + 3600


def reason(it: Rig) -> str:
    it.thread.join(SECONDS)
    [found] = it.reason
    return found


def drain(it: Rig, *then: Command) -> None:
    it.send(Drain(later()), *then)


def test_an_idle_engine_ends_at_once(it: Rig) -> None:
    drain(it)
    assert reason(it) == "it was drained"


def test_what_runs_is_finished_and_what_comes_is_refused_for_another_engine(it: Rig) -> None:
    it.start("waits for its KV", [1, 2], SOURCE)
    it.start("before", [1, 2], max_tokens=40)
    drain(it)
    it.start("after", [1, 2])
    refused = it.end_of("after")
    assert isinstance(refused, Failed)
    assert (refused.code, refused.retry_after) == (Draining.code, 1)
    finished = it.end_of("before")
    assert isinstance(finished, Tokens)
    assert finished.finish_reason == "length"
    assert it.thread.is_alive()
    it.send(AbortRequest("waits for its KV"))
    assert reason(it) == "it was drained"


def test_kv_that_is_to_be_read_is_waited_for(it: Rig) -> None:
    it.start("r", [1, 2, 3, 4, 5], Prefill())
    it.end_of("r")
    it.until(lambda: it.kv_events(PrefillEnded))
    drain(it)
    it.start("after", [1, 2])
    it.end_of("after")
    assert it.thread.is_alive(), "a round later it is still there"
    it.send(LeasesEnded(["r"]))
    assert reason(it) == "it was drained"


def test_it_ends_at_the_deadline_whatever_is_left(it: Rig) -> None:
    it.start("never gets its KV", [1, 2], SOURCE)
    it.send(Drain(0.0))
    assert reason(it) == "it was told to, with 1 requests and 0 leases left"


def test_told_again_it_keeps_its_first_deadline(it: Rig) -> None:
    it.start("never gets its KV", [1, 2], SOURCE)
    it.send(Drain(0.0), Drain(later()))
    assert reason(it) == "it was told to, with 1 requests and 0 leases left"
