"""Decode engines and prefill engines over real sockets; reads are ended by the test."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable

import msgspec
import pytest
import zmq

from tandem.ids import EngineIdentity
from tandem.transfer.decode import consumer as consumers
from tandem.transfer.decode import peer as peers
from tandem.transfer.thread.orders import OpenPeer
from tandem.wire.messages import Address, Introduce, PeerAddress
from tandem.wire.peer_messages import Claim, Hello, KvComputed, Release
from tandem.wire.sockets import Sockets
from tests.transfer.engines import ENVELOPE
from tests.transfer.pair import HOST, Prefill, Stage, stage, until

SHORT = 0.4

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")


def on_stage(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Runs the test in an event loop of its own; its first argument is the stage."""

    @functools.wraps(test)
    def run(**fixtures: object) -> None:
        async def body() -> None:
            async with stage() as made:
                await test(made, **fixtures)

        asyncio.run(body())

    del run.__wrapped__  # type: ignore[attr-defined]
    parameters = list(inspect.signature(test).parameters.values())[1:]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def introduce(*engines: Prefill) -> Introduce:
    return Introduce([PeerAddress(engine.identity, engine.address) for engine in engines])


# --- handshake -----------------------------------------------------------------------------------------------------


@on_stage
async def test_a_pair_shakes_hands_in_one_round_trip_over_one_connection(it: Stage) -> None:
    prefill, decode = it.prefill(), it.decode(ranks=2)
    decode.consumer.introduce(introduce(prefill))
    decode.consumer.introduce(introduce(prefill))
    await until(lambda: decode.states() == ["ready"])
    for number in range(5):
        prefill.offer(f"r{number}")
        decode.pull(f"r{number}", prefill.names(f"r{number}"))
    await until(lambda: len(decode.transfer_threads.reads) == 5)
    decode.end_reads()
    await until(lambda: len(prefill.ended) == 5)
    assert decode.sockets.connected == 1
    assert (prefill.heard["Hello"], prefill.heard["Claim"]) == (1, 5)
    assert decode.consumer.peers[0].handshake_time is not None
    opened = [order for _, order in decode.transfer_threads.orders if isinstance(order, OpenPeer)]
    assert [[source.rank for source in order.sources] for order in opened] == [[0], [0]]


@on_stage
async def test_other_software_that_speaks_a_common_version_is_welcome(it: Stage) -> None:
    other = msgspec.structs.replace(ENVELOPE, software="tandem 9.0", protocol=(2, 5))
    prefill, decode = it.prefill(), it.decode(envelope=other)
    decode.consumer.introduce(introduce(prefill))
    await until(lambda: decode.states() == ["ready"])


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("protocol", (3, 4), ("1 to 2", "3 to 4")),
        ("fingerprint", "other weights", ("fingerprint", "other weights")),
        ("kv_dtype", "bfloat16", ("float32", "bfloat16")),
        ("connector", "nixl", ("tcp", "nixl")),
    ],
)
@on_stage
async def test_a_pair_that_does_not_fit_is_refused_with_both_values_on_both_sides(
    it: Stage, field: str, value: object, shown: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    prefill, decode = it.prefill(), it.decode(envelope=msgspec.structs.replace(ENVELOPE, **{field: value}))
    decode.pull("r", prefill.names("r"))
    await until(lambda: decode.states() == ["refused"])
    ours, theirs = shown
    [(request_id, why)] = decode.failed
    assert request_id == "r"
    assert why == decode.consumer.peers[0].error == f"{field} differs: ours is {theirs}, theirs is {ours}"
    assert f"{field} differs: ours is {ours}, theirs is {theirs}" in caplog.text  # the listener's words
    assert decode.quiet == ["r"]
    decode.pull("s", prefill.names("s"))
    assert [request for request, _ in decode.failed] == ["r", "s"]
    assert decode.quiet == ["r", "s"]
    assert prefill.heard["Hello"] == 1


@on_stage
async def test_another_engine_or_life_than_was_meant_is_refused(it: Stage) -> None:
    prefill, decode = it.prefill("p0", "second life"), it.decode()
    decode.pull("r", prefill.names("r", incarnation="first life"))
    decode.pull("s", prefill.names("s", engine_id="p1"))
    await until(lambda: decode.states() == ["refused", "refused"])
    reasons = dict(decode.failed)
    assert "incarnation differs: ours is first life, theirs is second life" in reasons["r"]
    assert "engine_id differs: ours is p1, theirs is p0" in reasons["s"]


@on_stage
async def test_a_rank_that_cannot_connect_ends_the_session_and_its_pulls_once(it: Stage) -> None:
    prefill, decode = it.prefill(), it.decode(ranks=2)
    decode.transfer_threads.open_error = "no route"
    decode.pull("r", prefill.names("r"))
    await until(lambda: decode.quiet)
    assert decode.failed == [("r", "no route")]
    assert (decode.quiet, decode.states(), len(decode.transfer_threads.closed())) == (["r"], ["lost"], 1)


@on_stage
async def test_an_engine_that_is_not_there_fails_its_pulls_and_is_asked_again_later(
    it: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "HELLO_TIMEOUT", 0.2)
    monkeypatch.setattr(consumers, "RETRY_SECONDS", 0.0)
    gone, decode = it.prefill(), it.decode()
    await gone.die()
    decode.pull("r", gone.names("r"))
    await until(lambda: decode.quiet)
    assert "no answer from p0" in decode.failed[0][1]
    monkeypatch.setattr(peers, "HELLO_TIMEOUT", 10.0)
    back = await it.restart(gone, gone.identity.incarnation)
    back.offer("s")
    decode.pull("s", back.names("s"))
    await decode.reading()


# --- pulls ---------------------------------------------------------------------------------------------------------


@on_stage
async def test_chunks_are_read_as_they_come_and_the_blocks_go_back_once(it: Stage) -> None:
    prefill, decode = it.prefill(), it.decode(ranks=2)
    decode.pull("r", prefill.names("theirs"), tokens=10)  # claimed before the request
    await until(lambda: prefill.heard["Claim"])
    prefill.listener.begin("theirs")
    prefill.listener.chunk("theirs", 0, [5, 6], 6, False, None)
    first = await decode.reading()
    assert (first.start, first.stop, first.last, first.source_blocks) == (0, 4, False, [5, 6])
    decode.end_reads()
    assert decode.arrived == []
    prefill.listener.chunk("theirs", 1, [6, 7], 10, True, 99)
    last = await decode.reading()
    assert (last.start, last.stop, last.last, last.source_blocks) == (4, 10, True, [5, 6, 7])
    decode.transfer_threads.end(last, 0)
    assert decode.arrived == []
    decode.transfer_threads.end(last, 1)
    [pull] = decode.arrived
    assert (pull.request_id, pull.first_token, pull.bytes, pull.descriptors) == ("r", 99, 400, 8)
    await until(lambda: prefill.ended)
    assert (prefill.ended, decode.failed, prefill.heard["Release"]) == (["theirs"], [], 1)


@on_stage
async def test_an_aborted_prompt_fails_its_pull_also_where_the_claim_comes_later(it: Stage) -> None:
    prefill, decode, late = it.prefill(), it.decode(), it.decode("d1")
    late.consumer.introduce(introduce(prefill))
    await until(lambda: late.states() == ["ready"])
    decode.pull("r", prefill.names("r"))
    await until(lambda: prefill.heard["Claim"])
    prefill.listener.begin("r")
    prefill.listener.chunk("r", 0, [5, 6], 8, False, None)
    await decode.reading()
    prefill.listener.abort("r", "the client left")
    late.pull("r", prefill.names("r"))
    await until(lambda: late.quiet and decode.failed)
    assert decode.failed == late.failed == [("r", "the client left")]
    assert decode.quiet == []
    decode.end_reads()
    assert decode.quiet == ["r"]
    await until(lambda: prefill.ended)
    assert prefill.ended == ["r"]


@on_stage
async def test_a_failed_read_fails_the_pull_once_and_quiet_waits_for_all_ranks(it: Stage) -> None:
    prefill, decode = it.prefill(), it.decode(ranks=2)
    prefill.offer("r")
    decode.pull("r", prefill.names("r"))
    read = await decode.reading()
    decode.transfer_threads.end(read, 1, "disconnected")
    assert (decode.failed, decode.quiet) == ([("r", "disconnected")], [])
    decode.transfer_threads.end(read, 0, "disconnected")
    decode.transfer_threads.end(read, 0, "disconnected")
    assert (decode.failed, decode.quiet) == ([("r", "disconnected")], ["r"])


@on_stage
async def test_a_broken_connection_between_ranks_ends_the_session_and_the_next_one_connects_anew(
    it: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumers, "RETRY_SECONDS", 0.0)
    prefill, decode = it.prefill(), it.decode(ranks=2)
    for request_id in ("r", "s"):
        prefill.offer(request_id)
        decode.pull(request_id, prefill.names(request_id))
    await until(lambda: len(decode.transfer_threads.reads) == 2)
    read, other = decode.transfer_threads.reads
    decode.transfer_threads.end(read, 0, "connection reset", peer_lost=True)
    assert decode.states() == ["lost"]
    assert [(failed, "connection reset" in why) for failed, why in decode.failed] == [("r", True), ("s", True)]
    assert len(decode.transfer_threads.closed()) == 1
    for rest in (lambda: decode.transfer_threads.end(read, 1), lambda: decode.transfer_threads.end(other, 0)):
        rest()
    decode.transfer_threads.end(other, 1, "connection reset", peer_lost=True)
    assert sorted(decode.quiet) == ["r", "s"]
    decode.transfer_threads.reads.clear()
    decode.transfer_threads.open_error = "it is still leaving"
    decode.consumer.introduce(introduce(prefill))
    await until(lambda: len(decode.transfer_threads.closed()) == 2)
    assert decode.states() == ["lost"], "nobody should count on it before it is ready"
    decode.transfer_threads.open_error = None
    decode.consumer.introduce(introduce(prefill))
    assert decode.states() == ["lost"]
    await until(lambda: decode.states() == ["ready"])
    prefill.offer("t")
    decode.pull("t", prefill.names("t"))
    await decode.reading()


@on_stage
async def test_who_gives_up_is_told_quiet_once_its_read_has_ended(it: Stage) -> None:
    prefill, decode = it.prefill(), it.decode(ranks=2)
    prefill.offer("r")
    decode.pull("r", prefill.names("r"))
    read = await decode.reading()
    decode.consumer.give_up("r", "aborted")
    decode.consumer.give_up("r", "aborted")
    decode.transfer_threads.end(read, 0)
    assert decode.quiet == []
    decode.transfer_threads.end(read, 1)
    assert (decode.quiet, decode.arrived, decode.failed) == (["r"], [], [])
    decode.consumer.give_up("unknown", "aborted")
    assert decode.quiet == ["r", "unknown"]


@on_stage
async def test_giving_up_what_has_failed_already_waits_for_its_read_too(it: Stage) -> None:
    prefill, decode = it.prefill(), it.decode(ranks=1)
    decode.pull("r", prefill.names("r"))
    await until(lambda: prefill.heard["Claim"])
    prefill.listener.begin("r")
    prefill.listener.chunk("r", 0, [5, 6], 8, False, None)
    read = await decode.reading()
    prefill.listener.abort("r", "why")
    await until(lambda: decode.failed)
    decode.consumer.give_up("r", "the request has ended")
    assert decode.quiet == []
    decode.transfer_threads.end(read, 0)
    assert decode.quiet == ["r"]


@on_stage
async def test_two_requests_that_name_the_same_kv_do_not_take_it_from_each_other(it: Stage) -> None:
    prefill, decode = it.prefill(), it.decode(ranks=1)
    prefill.offer("theirs")
    decode.pull("r", prefill.names("theirs"))
    decode.pull("s", prefill.names("theirs"))
    assert [request for request, _ in decode.failed] == decode.quiet == ["s"]
    await decode.reading()
    decode.end_reads()
    assert [pull.request_id for pull in decode.arrived] == ["r"]


@on_stage
async def test_news_that_do_not_follow_each_other_fail_the_pull(it: Stage) -> None:
    prefill, decode = it.prefill(), it.decode(ranks=1)
    decode.pull("r", prefill.names("r"), tokens=12)
    await until(lambda: prefill.heard["Claim"])
    [reader] = prefill.listener._producer._offers["r"].readers
    prefill.listener._send(reader, KvComputed("life", "r", 1, [6], 8, False))
    await until(lambda: decode.quiet)
    assert "from 1 on" in decode.failed[0][1]
    assert decode.transfer_threads.reads == []


@pytest.mark.parametrize("tokens", [7, 9])
@on_stage
async def test_kv_of_a_prompt_of_another_length_is_not_used(it: Stage, tokens: int) -> None:
    prefill, decode = it.prefill(), it.decode(ranks=1)
    prefill.offer("r", tokens=8)
    decode.pull("r", prefill.names("r"), tokens=tokens)
    await until(lambda: decode.quiet)
    assert decode.failed == [("r", f"the prompt has {tokens} tokens here, 8 there")]
    assert decode.transfer_threads.reads == []


# --- leases and lost engines ---------------------------------------------------------------------------------------


@on_stage
async def test_a_request_that_never_comes_fails_its_pull(it: Stage) -> None:
    prefill, decode = it.prefill(ttl=SHORT), it.decode()
    decode.pull("r", prefill.names("r"))
    await until(lambda: decode.quiet)
    assert len(decode.failed) == 1
    await until(lambda: len(prefill.listener._producer) == 0)


@on_stage
async def test_a_long_prompt_is_kept_by_renewals(it: Stage) -> None:
    prefill, decode = it.prefill(ttl=SHORT), it.decode(ranks=1)
    prefill.listener.begin("r")
    decode.pull("r", prefill.names("r"))
    await until(lambda: prefill.heard["Renew"] >= 6)  # two leases long
    prefill.listener.chunk("r", 0, [5, 6], 8, True, 7)
    await decode.reading()
    await until(lambda: prefill.heard["Renew"] >= 12)
    assert prefill.ended == []
    decode.end_reads()
    assert len(decode.arrived) == 1
    await until(lambda: prefill.ended)


@on_stage
async def test_bytes_that_come_after_the_engine_was_lost_are_not_used(it: Stage) -> None:
    prefill, decode = it.prefill(ttl=SHORT), it.decode(ranks=1)
    prefill.offer("r")
    decode.pull("r", prefill.names("r"))
    await decode.reading()
    await prefill.die()
    await until(lambda: decode.failed)
    assert (len(decode.failed), decode.quiet, decode.states()) == (1, [], ["lost"])
    decode.end_reads()
    assert (decode.arrived, decode.quiet, len(decode.failed)) == ([], ["r"], 1)


@on_stage
async def test_bytes_of_a_lease_that_the_holder_has_ended_are_not_used(it: Stage) -> None:
    prefill, decode = it.prefill(ttl=SHORT), it.decode(ranks=1)
    prefill.offer("r")
    prefill.offer("s")
    decode.pull("r", prefill.names("r"))
    decode.pull("s", prefill.names("s"))
    await until(lambda: len(decode.transfer_threads.reads) == 2)
    [reader] = prefill.listener._producer._offers["r"].readers
    prefill.listener._producer.release(reader, Release("life", ["r"]), 0.0)  # as if its lease had ended
    await until(lambda: decode.failed)
    decode.end_reads()
    assert [request for request, _ in decode.failed] == decode.quiet == ["r"]
    assert [pull.request_id for pull in decode.arrived] == ["s"]
    assert decode.states() == ["ready"]


@on_stage
async def test_a_read_that_ends_after_its_lease_is_thrown_away(it: Stage) -> None:
    prefill, decode = it.prefill(), it.decode(ranks=1)
    prefill.offer("r")
    decode.pull("r", prefill.names("r"))
    read = await decode.reading()
    [session] = decode.consumer._sessions.values()
    session._leases._leases["r"].valid_until = 0.0  # no answer has come for so long
    decode.transfer_threads.end(read, 0)
    assert (decode.arrived, decode.quiet) == ([], ["r"])
    assert decode.failed == [("r", "the lease ended before the read did")]


@on_stage
async def test_an_engine_that_restarted_refuses_its_old_sessions(it: Stage) -> None:
    first, decode = it.prefill(), it.decode(ranks=2)
    decode.consumer.introduce(introduce(first))
    await until(lambda: decode.states() == ["ready"])
    await first.die()
    second = await it.restart(first, "second life")
    first_names = first.names("r")
    decode.pull("r", first_names)
    await until(lambda: decode.quiet)
    [(_, why)] = decode.failed
    assert "restarted" in why
    assert "second life" in why
    assert decode.states() == ["lost"]
    assert len(decode.transfer_threads.closed()) == 1
    decode.consumer.introduce(introduce(second))
    second.offer("s")
    decode.pull("s", second.names("s"))
    await decode.reading()
    assert decode.states() == ["ready"], "the first life is forgotten"
    assert second.heard["Hello"] == 1


@on_stage
async def test_a_read_in_progress_outlives_its_session_and_then_is_quiet_once(it: Stage) -> None:
    first, decode = it.prefill(ttl=30.0), it.decode(ranks=2)
    first.offer("r")
    decode.pull("r", first.names("r"))
    read = await decode.reading()
    await first.die()
    await it.restart(first, "second life")
    decode.pull("s", first.names("s"))
    await until(lambda: len(decode.failed) == 2)
    assert decode.quiet == ["s"]
    decode.transfer_threads.end(read, 0, "closed")
    assert decode.quiet == ["s"]
    decode.transfer_threads.end(read, 1)
    assert decode.quiet == ["s", "r"]
    assert sorted(request for request, _ in decode.failed) == ["r", "s"]
    assert decode.arrived == []


@on_stage
async def test_a_session_that_ended_leaves_no_task_behind(it: Stage) -> None:
    before = asyncio.all_tasks()
    first, decode = it.prefill(), it.decode()
    decode.consumer.introduce(introduce(first))
    await until(lambda: decode.states() == ["ready"])
    await first.die()
    second = await it.restart(first, "second life")
    decode.pull("r", first.names("r"))
    await until(lambda: decode.states() == ["lost"])
    await second.die()
    await until(lambda: asyncio.all_tasks() <= before)


@on_stage
async def test_an_engine_that_left_is_forgotten_once_nothing_is_read_from_it(it: Stage) -> None:
    prefill, decode = it.prefill(), it.decode(ranks=1)
    decode.consumer.introduce(introduce(prefill))
    prefill.offer("r")
    decode.pull("r", prefill.names("r"))
    await decode.reading()
    decode.consumer.introduce(introduce())
    assert decode.states() == ["ready"]
    decode.end_reads()
    assert len(decode.arrived) == 1
    decode.consumer.introduce(introduce())
    assert decode.states() == []
    assert len(decode.transfer_threads.closed()) == 1


@on_stage
async def test_a_dead_engine_delays_no_other(it: Stage) -> None:
    dead, alive, decode = it.prefill("p0"), it.prefill("p1"), it.decode(ranks=1)
    await dead.die()
    decode.pull("r", dead.names("r"))
    for number in range(3):
        alive.offer(str(number))
        decode.pull(str(number), alive.names(str(number)))
    await until(lambda: len(decode.transfer_threads.reads) == 3)
    decode.end_reads()
    assert len(decode.arrived) == 3
    assert decode.states() == ["connecting", "ready"]  # nobody has waited for the dead one
    assert decode.failed == []


# --- what foreign proxies may say ----------------------------------------------------------------------------------


@on_stage
async def test_a_wrong_address_does_not_harm_the_session_with_the_right_one(it: Stage) -> None:
    prefill, decode = it.prefill(), it.decode(ranks=1)
    nobody = it.prefill()
    await nobody.die()
    decode.pull("r", prefill.names("r", address=nobody.address, foreign=True))
    decode.consumer.introduce(introduce(prefill))
    prefill.offer("s")
    decode.pull("s", prefill.names("s"))
    await decode.reading()
    assert sorted(decode.states()) == ["connecting", "ready"]


@on_stage
async def test_an_address_that_may_not_be_called_costs_only_that_pull(it: Stage) -> None:
    """Off loopback nothing is connected to without a key."""
    prefill, decode = it.prefill(), it.decode()
    decode.pull("r", prefill.names("r", address=Address("192.0.2.7", 7001), foreign=True))
    assert "without a cluster key" in decode.failed[0][1]
    assert decode.quiet[0] == "r"
    prefill.offer("s")
    decode.pull("s", prefill.names("s"))
    await decode.reading()


@on_stage
async def test_sessions_with_and_without_a_known_life_stand_side_by_side(it: Stage) -> None:
    prefill, decode = it.prefill(ttl=SHORT), it.decode(ranks=1)
    decode.consumer.introduce(introduce(prefill))
    await until(lambda: decode.states() == ["ready"])
    prefill.offer("r")
    decode.pull("r", prefill.names("r", incarnation=None, foreign=True))
    await decode.reading()
    heard = prefill.heard["Renew"]
    await until(lambda: prefill.heard["Renew"] > heard + 8)  # both are alive for longer than a lease
    assert decode.states() == ["ready", "ready"]
    decode.end_reads()
    assert len(decode.arrived) == 1


@on_stage
async def test_more_engines_than_there_may_be_fail_their_pulls_until_others_have_ended(
    it: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumers, "MAX_SESSIONS", 1)
    first, second, decode = it.prefill("p0"), it.prefill("p1"), it.decode(ranks=1)
    decode.consumer.introduce(introduce(first))
    decode.pull("r", second.names("r"))
    assert [request for request, _ in decode.failed] == decode.quiet == ["r"]
    decode.transfer_threads.open_error = "no route"
    await until(lambda: decode.states() == ["lost"])
    decode.transfer_threads.open_error = None
    second.offer("s")
    decode.pull("s", second.names("s"))
    await decode.reading()


# --- hostile peers -------------------------------------------------------------------------------------------------


@on_stage
async def test_bad_messages_are_counted_and_dropped_and_the_listener_lives(it: Stage) -> None:
    prefill, decode = it.prefill(), it.decode(ranks=1)
    codec = prefill.listener._codec
    socket = Sockets(it.context, None).connect(zmq.DEALER, HOST, prefill.port)
    bad: list[list[bytes]] = [
        [b""],
        [b"\xc1"],
        [b"\xdf\xff\xff\xff\xff"],
        [b"\x82\xa1z" + b"\x91" * 50_000],
        [b"", codec.encode(Claim("life", "r"))],
        [codec.encode(Claim("", "r"))],
        [codec.encode(KvComputed("life", "r", 0, [1], 4, True))],
        [bytes(9 * 1024 * 1024)],
    ]
    for frames in bad:
        await socket.send_multipart(frames)
    await until(lambda: prefill.listener.bad_messages == len(bad))
    prefill.offer("r")
    decode.pull("r", prefill.names("r"))
    await decode.reading()
    socket.close()


@on_stage
async def test_messages_out_of_order_are_answered_and_change_nothing(it: Stage) -> None:
    prefill = it.prefill()
    socket = Sockets(it.context, None).connect(zmq.DEALER, HOST, prefill.port)
    codec = prefill.listener._codec

    async def ask(message: object) -> dict[str, object]:
        await socket.send(codec.encode(message))
        async with asyncio.timeout(20):
            return msgspec.msgpack.decode(await socket.recv())

    assert (await ask(Claim("another life", "r")))["type"] == "refused"
    await socket.send(codec.encode(Release("life", ["never claimed"])))
    hello = Hello(ENVELOPE, EngineIdentity("d0", "x"), "p0")
    assert (await ask(hello))["type"] == "welcome"
    assert (await ask(hello))["type"] == "welcome"
    assert len(prefill.listener._producer) == 0
    socket.close()


@on_stage
async def test_a_peer_that_talks_nonsense_is_lost_and_nothing_else(it: Stage) -> None:
    socket, port = Sockets(it.context, None).bind(zmq.ROUTER, HOST, 0)
    decode = it.decode(ranks=1)
    prefill = it.prefill("p1")
    decode.pull("r", prefill.names("r", engine_id="p0", address=Address(HOST, port)))
    client, _ = await socket.recv_multipart()
    await socket.send_multipart([client, b"\xc1"])
    await until(lambda: decode.quiet)
    assert "p0" in decode.failed[0][1]
    prefill.offer("s")
    decode.pull("s", prefill.names("s"))
    await decode.reading()
    socket.close()


@on_stage
async def test_an_announcement_that_was_lost_with_the_connection_is_asked_for_again(it: Stage) -> None:
    prefill, decode = it.prefill(ttl=0.5), it.decode()
    decode.pull("r", prefill.names("r"))
    await until(lambda: prefill.heard["Claim"] == 1)
    send = prefill.listener._send
    prefill.listener._send = lambda client, message: None if isinstance(message, KvComputed) else send(client, message)
    prefill.offer("r")
    prefill.listener._send = send
    await until(lambda: decode.transfer_threads.reads)
    decode.end_reads()
    await until(lambda: prefill.ended == ["r"])
    assert [pull.first_token for pull in decode.arrived] == [7]
