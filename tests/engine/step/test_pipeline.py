"""Leader and followers over real sockets; what they compute is played."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import zmq

from tandem.engine.step import pipeline as pipelines
from tandem.engine.step.pipeline import LEADER_SOCKET, Follower, Here, LeaderPipeline, follower_socket
from tandem.engine.step.step_message import Step, StepEncoder
from tandem.errors import EngineFailed, RankLost
from tandem.scheduling.batch import Batch, Sampled, StepResult
from tandem.wire.keys import new_key
from tandem.wire.sockets import Sockets
from tests.support.grammars import no_grammars

SECONDS = 10
RESULT = StepResult(7, [Sampled(1)])


class Bench:
    """A leader's listening socket, and the connections that a test makes to it."""

    def __init__(self) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.sockets = Sockets(self.context, new_key())
        self.listener, self.port = self.sockets.bind(zmq.ROUTER, "127.0.0.1", 0, LEADER_SOCKET)

    def follower(self, rank: int) -> zmq.Socket[bytes]:
        made = self.sockets.connect(zmq.DEALER, "127.0.0.1", self.port, follower_socket(rank))
        made.send(msgspec.msgpack.encode(Here()))
        return made

    def pipeline(self, ranks: int) -> LeaderPipeline:
        return LeaderPipeline(object(), StepEncoder(4), self.listener, ranks, no_grammars(), 0)  # type: ignore[arg-type]


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.context.destroy(linger=0)


def results(pipeline: LeaderPipeline, listener: zmq.Socket[bytes]) -> list[StepResult]:
    """The next results, as the step loop comes by them."""
    while not (found := pipeline.results()):
        assert listener.poll(SECONDS * 1000)
    return found


def wait_for_loss(pipeline: LeaderPipeline) -> None:
    """Until results() raises; the test's own time limit bounds it."""
    while True:
        pipeline.results()


def test_a_rank_that_came_before_the_leader_was_ready_for_it_is_missed_when_it_goes(bench: Bench) -> None:
    follower = bench.follower(1)
    assert bench.listener.poll(SECONDS * 1000), "its greeting is there before the leader looks"
    pipeline = bench.pipeline(2)
    pipeline.wait_for_followers()
    follower.close()
    with pytest.raises(RankLost, match="rank 1 of this engine was lost"):
        wait_for_loss(pipeline)


def test_a_rank_that_goes_before_all_are_there_ends_the_wait(bench: Bench) -> None:
    follower = bench.follower(1)
    assert bench.listener.poll(SECONDS * 1000)
    follower.close()
    with pytest.raises(RankLost, match="rank 1 of this engine was lost"):
        bench.pipeline(3).wait_for_followers()


def test_strangers_may_come_and_go(bench: Bench) -> None:
    before = socket.create_connection(("127.0.0.1", bench.port))
    follower = bench.follower(1)
    pipeline = bench.pipeline(2)
    pipeline.wait_for_followers()
    after = socket.create_connection(("127.0.0.1", bench.port))
    before.close()
    after.close()
    # Each result is a round of the thread that also sees connections end: the strangers' ends are known by then.
    for _ in range(20):
        follower.send(msgspec.msgpack.encode(RESULT))
        assert results(pipeline, bench.listener) == [RESULT]


def test_a_follower_whose_leader_is_gone_before_it_could_connect_says_so(bench: Bench) -> None:
    bench.listener.disable_monitor()
    bench.listener.close(linger=0)
    follower = bench.follower(1)
    with pytest.raises(RankLost, match="the leader of this engine was lost"):
        Follower(object(), follower).run()  # type: ignore[arg-type]


def test_a_follower_whose_leader_goes_says_so(bench: Bench) -> None:
    follower = bench.follower(1)
    pipeline = bench.pipeline(2)
    pipeline.wait_for_followers()
    bench.listener.disable_monitor()
    bench.listener.close(linger=0)
    with pytest.raises(RankLost, match="the leader of this engine was lost"):
        Follower(object(), follower).run()  # type: ignore[arg-type]


def test_a_halt_ends_a_follower_in_good_order(bench: Bench) -> None:
    follower = bench.follower(1)
    pipeline = bench.pipeline(2)
    pipeline.wait_for_followers()
    pipeline.close("it was told to stop", failed=False)
    assert Follower(object(), follower).run() == "it was told to stop"  # type: ignore[arg-type]


def test_a_halt_of_an_engine_that_failed_tells_the_follower_why(bench: Bench) -> None:
    follower = bench.follower(1)
    pipeline = bench.pipeline(2)
    pipeline.wait_for_followers()
    pipeline.close("rank 2 of this engine was lost", failed=True)
    with pytest.raises(RankLost, match="rank 2 of this engine was lost"):
        Follower(object(), follower).run()  # type: ignore[arg-type]


class Broken:
    """A runner whose collective fails because a rank has gone."""

    def __init__(self, gone: Callable[[], None]) -> None:
        self._gone = gone

    def run(self, step: Step, masks: object) -> None:
        self._gone()
        raise EngineFailed("connection closed by peer")


def test_a_collective_that_fails_with_a_rank_that_goes_names_the_rank(bench: Bench) -> None:
    follower = bench.follower(1)
    broken: Any = Broken(follower.close)
    pipeline = LeaderPipeline(broken, StepEncoder(4), bench.listener, 2, no_grammars(), 0)
    pipeline.wait_for_followers()
    with pytest.raises(RankLost, match="rank 1 of this engine was lost"):
        pipeline.submit(Batch(1, []))


def test_a_collective_that_fails_for_another_reason_says_that(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines, "CAUSE_SECONDS", 0)
    follower = bench.follower(1)
    broken: Any = Broken(lambda: None)
    pipeline = LeaderPipeline(broken, StepEncoder(4), bench.listener, 2, no_grammars(), 0)
    pipeline.wait_for_followers()
    assert not follower.closed
    with pytest.raises(EngineFailed, match="connection closed by peer"):
        pipeline.submit(Batch(1, []))


def test_a_followers_collective_that_fails_is_explained_by_the_leader(bench: Bench) -> None:
    follower = bench.follower(1)
    pipeline = bench.pipeline(2)
    pipeline.wait_for_followers()
    bench.listener.send_multipart([b"1", msgspec.msgpack.encode(Step(1, []))])
    broken = Broken(lambda: pipeline.close("rank 2 of this engine was lost", failed=True))
    with pytest.raises(RankLost, match="rank 2 of this engine was lost"):
        Follower(broken, follower).run()  # type: ignore[arg-type]


def test_a_followers_collective_that_nobody_explains_speaks_for_itself(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipelines, "CAUSE_SECONDS", 0)
    follower = bench.follower(1)
    pipeline = bench.pipeline(2)
    pipeline.wait_for_followers()
    bench.listener.send_multipart([b"1", msgspec.msgpack.encode(Step(1, []))])
    with pytest.raises(EngineFailed, match="connection closed by peer"):
        Follower(Broken(lambda: None), follower).run()  # type: ignore[arg-type]


def test_a_leader_that_stops_in_good_order_goes_last(bench: Bench) -> None:
    """Or its end might overtake its word, and be taken for a loss."""
    follower = bench.follower(1)
    pipeline = bench.pipeline(2)
    pipeline.wait_for_followers()
    ended: list[str] = []

    def follow() -> None:
        ended.append(Follower(object(), follower).run())  # type: ignore[arg-type]
        follower.disable_monitor()
        follower.close(linger=0)

    following = threading.Thread(target=follow)
    following.start()
    pipeline.close("it was told to stop", failed=False)
    assert ended == ["it was told to stop"]
    following.join()
