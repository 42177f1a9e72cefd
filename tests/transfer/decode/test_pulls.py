"""Decode engines and prefill engines, joined in memory; time and the ends of reads are the test's."""

from __future__ import annotations

import msgspec
import pytest

from tandem.transfer.decode import sessions as module
from tandem.transfer.decode.pull import ABANDONED_SECONDS
from tandem.transfer.decode.session import DOUBT_SECONDS
from tandem.transfer.thread.thread_messages import PeerOpened
from tandem.wire.messages import Address
from tandem.wire.peer_messages import Claimed, KvComputed, Release, Renewed, Welcome
from tests.transfer.engines import ENVELOPE
from tests.transfer.pair import TICK, Decode, Network, Prefill

TTL = 10.0


@pytest.fixture
def net() -> Network:
    return Network()


def pair(net: Network, ranks: int = 1) -> tuple[Prefill, Decode]:
    return net.prefill(), net.decode(ranks=ranks)


# --- handshake -----------------------------------------------------------------------------------------------------


def test_ranks_that_speak_of_a_session_before_its_welcome_do_not_make_it_ready(net: Network) -> None:
    prefill, decode = pair(net)
    net.lost = lambda message: isinstance(message, Welcome)
    decode.introduce(prefill)
    decode.pulls.reported(PeerOpened(0, 1), net.now)
    assert decode.states() == ["connecting"]


def test_a_pair_shakes_hands_in_one_round_trip_over_one_connection(net: Network) -> None:
    prefill, decode = pair(net, ranks=2)
    decode.introduce(prefill)
    decode.introduce(prefill)
    assert decode.states() == ["ready"]
    for number in range(5):
        prefill.offer(f"r{number}")
        decode.pull(f"r{number}", prefill.names(f"r{number}"))
    assert len(decode.reads) == 5
    decode.end_reads()
    assert len(prefill.ended) == 5
    assert decode.connections == 1
    assert (prefill.heard["Hello"], prefill.heard["Claim"]) == (1, 5)
    assert decode.peers[0].handshake_time is not None
    assert [[source.rank for source in order.sources] for order in decode.opened] == [[0], [0]]


def test_other_software_that_speaks_a_common_version_is_welcome(net: Network) -> None:
    other = msgspec.structs.replace(ENVELOPE, software="tandem 9.0", protocol=(2, 5))
    prefill, decode = net.prefill(), net.decode(envelope=other)
    decode.introduce(prefill)
    assert decode.states() == ["ready"]


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("protocol", (3, 4), ("1 to 2", "3 to 4")),
        ("fingerprint", "other weights", ("fingerprint", "other weights")),
        ("kv_dtype", "bfloat16", ("float32", "bfloat16")),
        ("connector", "nixl", ("tcp", "nixl")),
    ],
)
def test_a_pair_that_does_not_fit_is_refused_with_both_values(
    net: Network, field: str, value: object, shown: tuple[str, str]
) -> None:
    prefill, decode = net.prefill(), net.decode(envelope=msgspec.structs.replace(ENVELOPE, **{field: value}))
    decode.pull("r", prefill.names("r"))
    assert decode.states() == ["refused"]
    theirs, ours = shown
    [peer] = decode.peers
    assert decode.failed == [("r", f"{field} differs: ours is {ours}, theirs is {theirs}")]
    assert peer.error == decode.failed[0][1]
    assert peer.refusal is not None
    assert (peer.refusal.field, peer.refusal.ours, peer.refusal.theirs) == (field, ours, theirs)
    assert decode.quiet == ["r"]


def test_an_incarnation_that_has_refused_is_not_asked_again_but_what_answers_there_later_may_fit(net: Network) -> None:
    prefill, decode = net.prefill(), net.decode(envelope=msgspec.structs.replace(ENVELOPE, connector="nixl"))
    decode.pull("r", prefill.names("r"))
    decode.pull("s", prefill.names("s"))
    net.pass_time(module.RETRY_SECONDS + 1)
    decode.pull("t", prefill.names("t"))
    assert [request for request, _ in decode.failed] == decode.quiet == ["r", "s", "t"]
    assert prefill.heard["Hello"] == 1
    for request_id in ("u", "v"):
        decode.pull(request_id, prefill.names(request_id, incarnation=None, foreign=True))
        net.pass_time(module.RETRY_SECONDS + 1)
    assert prefill.heard["Hello"] == 3


def test_another_engine_or_incarnation_than_was_meant_is_refused(net: Network) -> None:
    prefill, decode = net.prefill("p0", "second"), net.decode()
    decode.pull("r", prefill.names("r", incarnation="first"))
    decode.pull("s", prefill.names("s", engine_id="p1"))
    assert decode.states() == ["refused", "refused"]
    reasons = dict(decode.failed)
    assert "incarnation differs: ours is first, theirs is second" in reasons["r"]
    assert "engine_id differs: ours is p1, theirs is p0" in reasons["s"]


def test_a_description_of_another_engine_than_the_one_that_answers_ends_the_session(net: Network) -> None:
    prefill, decode = pair(net)
    other = net.prefill("p1").welcome
    prefill.welcome = msgspec.structs.replace(prefill.welcome, descriptor=other.descriptor)
    decode.pull("r", prefill.names("r"))
    assert "describes another engine" in decode.failed[0][1]
    assert decode.states() == ["lost"]


def test_another_answer_than_a_welcome_ends_the_session(net: Network) -> None:
    prefill, decode = pair(net)
    net.lost = lambda message: isinstance(message, Welcome)
    decode.pull("r", prefill.names("r"))
    decode.pulls.received(1, Renewed("first", 0, []), net.now)
    decode.tick()
    assert "a welcome was expected" in decode.failed[0][1]
    assert (decode.quiet, decode.states(), decode.connected) == (["r"], ["lost"], {})


def test_a_rank_that_cannot_connect_ends_the_session_and_its_pulls_once(net: Network) -> None:
    prefill, decode = pair(net, ranks=2)
    decode.open_error = "no route"
    decode.pull("r", prefill.names("r"))
    assert decode.failed == [("r", "no route")]
    assert (decode.quiet, decode.states(), len(decode.closed)) == (["r"], ["lost"], 1)


def test_ranks_that_never_connect_end_the_session(net: Network) -> None:
    prefill, decode = pair(net)
    decode._opens = lambda order, rank: lambda: None  # type: ignore[method-assign]
    decode.pull("r", prefill.names("r"))
    net.pass_time(61.0)
    assert "did not connect" in decode.failed[0][1]
    assert (decode.quiet, decode.states()) == (["r"], ["lost"])


def test_an_engine_that_is_not_there_fails_its_pulls_and_is_asked_again_later(net: Network) -> None:
    gone, decode = pair(net)
    gone.die()
    decode.pull("r", gone.names("r"))
    net.pass_time(9.0)
    assert decode.failed == []
    net.pass_time(2.0)
    assert decode.quiet == ["r"]
    assert "no answer from p0" in decode.failed[0][1]
    back = gone.restart(gone.identity.incarnation)
    net.pass_time(module.RETRY_SECONDS)
    back.offer("s")
    decode.pull("s", back.names("s"))
    assert len(decode.reads) == 1


# --- pulls ---------------------------------------------------------------------------------------------------------


def test_chunks_are_read_as_they_come_and_the_blocks_go_back_once(net: Network) -> None:
    prefill, decode = pair(net, ranks=2)
    decode.pull("r", prefill.names("theirs"), tokens=10)  # claimed before the request
    assert prefill.heard["Claim"]
    prefill.begin("theirs")
    prefill.chunk("theirs", 0, [5, 6], 6, False)
    [first] = decode.reads
    assert (first.start, first.stop, first.last, first.source_blocks) == (0, 4, False, [5, 6])
    decode.end_reads()
    assert decode.arrived == []
    prefill.chunk("theirs", 1, [6, 7], 10, True, 99)
    [last] = decode.reads
    assert (last.start, last.stop, last.last, last.source_blocks) == (4, 10, True, [5, 6, 7])
    decode.end(last, 0)
    assert decode.arrived == []
    assert prefill.ended == []
    decode.end(last, 1)
    [pull] = decode.arrived
    assert (pull.request_id, pull.first_token, pull.bytes, pull.descriptors) == ("r", 99, 400, 8)
    assert (prefill.ended, decode.failed, prefill.heard["Release"]) == (["theirs"], [], 1)
    assert len(decode.pulls) == 0


def test_an_aborted_prompt_fails_its_pull_also_where_the_claim_comes_later(net: Network) -> None:
    prefill, decode = pair(net)
    late = net.decode("d1")
    late.introduce(prefill)
    decode.pull("r", prefill.names("r"))
    prefill.begin("r")
    prefill.chunk("r", 0, [5, 6], 8, False)
    assert len(decode.reads) == 1
    net.lost = lambda message: isinstance(message, Release)
    prefill.abort("r", "the client left")
    late.pull("r", prefill.names("r"))
    assert decode.failed == late.failed == [("r", "the client left")]
    assert (late.quiet, decode.quiet) == (["r"], [])
    decode.end_reads()
    assert decode.quiet == ["r"]
    net.pass_time(TTL + 1)
    assert prefill.ended == ["r"]


def test_a_failed_read_fails_the_pull_once_and_quiet_waits_for_all_ranks(net: Network) -> None:
    prefill, decode = pair(net, ranks=2)
    prefill.offer("r")
    decode.pull("r", prefill.names("r"))
    [read] = decode.reads
    decode.end(read, 1, "disconnected")
    assert (decode.failed, decode.quiet) == ([("r", "disconnected")], [])
    decode.end(read, 0, "disconnected")
    decode.end(read, 0, "disconnected")
    assert (decode.failed, decode.quiet) == ([("r", "disconnected")], ["r"])
    assert decode.pulls.failures == 1


def test_a_read_that_failed_and_may_still_write_is_not_quiet_before_it_is_told_so(net: Network) -> None:
    prefill, decode = pair(net, ranks=2)
    prefill.offer("r")
    decode.pull("r", prefill.names("r"))
    [read] = decode.reads
    decode.end(read, 0, "connection reset", peer_lost=True, may_still_write=True)
    assert decode.failed == [("r", "connection reset")]
    decode.end(read, 1, "connection reset", peer_lost=True)
    decode.give_up("r")
    net.pass_time(100 * TTL)
    assert decode.quiet == []
    assert decode.pulls.knows("r")
    decode.quieten(read, 0)
    decode.quieten(read, 0)
    assert decode.quiet == ["r"]
    assert not decode.pulls.knows("r")


def test_a_broken_connection_between_ranks_ends_the_session_and_the_next_one_connects_again(net: Network) -> None:
    prefill, decode = pair(net, ranks=2)
    for request_id in ("r", "s"):
        prefill.offer(request_id)
        decode.pull(request_id, prefill.names(request_id))
    read, other = decode.reads
    decode.end(read, 0, "connection reset", peer_lost=True)
    assert decode.states() == ["lost"]
    assert decode.failed == [("r", "connection reset"), ("s", "connection reset")]
    assert len(decode.closed) == 1
    decode.end(read, 1)
    decode.end(other, 0)
    assert decode.quiet == ["r"]
    decode.end(other, 1, "connection reset", peer_lost=True)
    assert decode.quiet == ["r", "s"]
    decode.reads.clear()
    net.pass_time(module.RETRY_SECONDS)
    decode.open_error = "it is still leaving"
    decode.introduce(prefill)
    assert len(decode.closed) == 2
    assert decode.states() == ["lost"]
    net.pass_time(module.RETRY_SECONDS)
    decode.open_error = None
    net.lost = lambda message: isinstance(message, Welcome)
    decode.introduce(prefill)
    assert decode.states() == ["lost"], "nobody should count on it before it is ready"
    decode.pulls.received(3, prefill.welcome, net.now)
    decode.tick()
    net.deliver()
    assert decode.states() == ["ready"]
    prefill.offer("t")
    decode.pull("t", prefill.names("t"))
    assert len(decode.reads) == 1


def test_who_gives_up_is_told_quiet_once_its_read_has_ended(net: Network) -> None:
    prefill, decode = pair(net, ranks=2)
    prefill.offer("r")
    decode.pull("r", prefill.names("r"))
    [read] = decode.reads
    decode.give_up("r")
    decode.give_up("r")
    decode.end(read, 0)
    assert decode.quiet == []
    decode.end(read, 1)
    assert (decode.quiet, decode.arrived, decode.failed) == (["r"], [], [])
    assert prefill.ended == ["r"]
    decode.give_up("unknown")
    assert decode.quiet == ["r", "unknown"]


def test_giving_up_what_has_failed_already_waits_for_its_read_too(net: Network) -> None:
    prefill, decode = pair(net)
    decode.pull("r", prefill.names("r"))
    prefill.begin("r")
    prefill.chunk("r", 0, [5, 6], 8, False)
    [read] = decode.reads
    prefill.abort("r", "why")
    assert len(decode.failed) == 1
    decode.give_up("r")
    assert decode.quiet == []
    decode.end(read, 0)
    assert decode.quiet == ["r"]


def test_a_read_that_nobody_wants_and_that_does_not_end_ends_its_session_so_that_the_blocks_come_back(
    net: Network,
) -> None:
    prefill, decode = pair(net)
    prefill.offer("r")
    decode.pull("r", prefill.names("r"))
    [read] = decode.reads
    net.pass_time(ABANDONED_SECONDS + 5)  # as long as it is wanted, it may take its time
    assert decode.states() == ["ready"]
    decode.give_up("r")
    net.pass_time(ABANDONED_SECONDS - 1)
    assert (decode.states(), decode.quiet) == (["ready"], [])
    net.pass_time(2)
    assert (decode.states(), decode.connected) == (["lost"], {})
    decode.end(read, 0, error="disconnected")
    assert decode.quiet == ["r"]


def test_two_requests_that_name_the_same_kv_do_not_take_it_from_each_other(net: Network) -> None:
    prefill, decode = pair(net)
    prefill.offer("theirs")
    decode.pull("r", prefill.names("theirs"))
    decode.pull("s", prefill.names("theirs"))
    assert [request for request, _ in decode.failed] == decode.quiet == ["s"]
    decode.end_reads()
    assert [pull.request_id for pull in decode.arrived] == ["r"]


def test_announcements_that_do_not_follow_each_other_fail_the_pull(net: Network) -> None:
    prefill, decode = pair(net)
    decode.pull("r", prefill.names("r"), tokens=12)
    decode.pulls.received(1, KvComputed("first", "r", 1, [6], 8, False), net.now)
    decode.tick()
    assert "from 1 on" in decode.failed[0][1]
    assert (decode.reads, decode.quiet) == ([], ["r"])


@pytest.mark.parametrize("tokens", [7, 9])
def test_kv_of_a_prompt_of_another_length_is_not_used(net: Network, tokens: int) -> None:
    prefill, decode = pair(net)
    prefill.offer("r", tokens=8)
    decode.pull("r", prefill.names("r"), tokens=tokens)
    assert decode.failed == [("r", f"the prompt has {tokens} tokens here, 8 there")]
    assert (decode.reads, decode.quiet) == ([], ["r"])


# --- leases and lost engines ---------------------------------------------------------------------------------------


def test_a_request_that_never_comes_fails_its_pull(net: Network) -> None:
    prefill, decode = pair(net)
    decode.pull("r", prefill.names("r"))
    net.pass_time(TTL + 1)
    assert (len(decode.failed), decode.quiet) == (1, ["r"])
    assert len(prefill.offers) == 0


def test_a_long_prompt_is_kept_by_renewals(net: Network) -> None:
    prefill, decode = pair(net)
    prefill.begin("r")
    decode.pull("r", prefill.names("r"))
    net.pass_time(3 * TTL)
    assert 6 <= prefill.heard["Renew"] <= 12
    prefill.chunk("r", 0, [5, 6], 8, True, 7)
    net.pass_time(3 * TTL)
    assert prefill.ended == []
    decode.end_reads()
    assert len(decode.arrived) == 1
    assert prefill.ended == ["r"]


def test_bytes_that_come_after_the_engine_was_lost_are_not_used(net: Network) -> None:
    prefill, decode = pair(net)
    prefill.offer("r")
    decode.pull("r", prefill.names("r"))
    prefill.die()
    net.pass_time(TTL + 1)
    assert (len(decode.failed), decode.quiet, decode.states()) == (1, [], ["lost"])
    decode.end_reads()
    assert (decode.arrived, decode.quiet, len(decode.failed)) == ([], ["r"], 1)


def test_an_engine_that_is_lost_is_noticed_without_any_request(net: Network) -> None:
    prefill, decode = pair(net)
    decode.introduce(prefill)
    net.pass_time(5 * TTL)
    assert decode.states() == ["ready"]
    prefill.die()
    net.pass_time(TTL + 1)
    assert decode.states() == ["lost"]
    assert "has not answered for" in (decode.peers[0].error or "")


def test_bytes_of_a_lease_that_the_holder_has_ended_are_not_used(net: Network) -> None:
    prefill, decode = pair(net)
    for request_id in ("r", "s"):
        prefill.offer(request_id)
        decode.pull(request_id, prefill.names(request_id))
    prefill.end_leases("r")
    net.pass_time(TTL / 2)
    decode.end_reads()
    assert [request for request, _ in decode.failed] == decode.quiet == ["r"]
    assert [pull.request_id for pull in decode.arrived] == ["s"]
    assert decode.states() == ["ready"]


def test_a_read_that_ends_after_its_lease_is_thrown_away(net: Network) -> None:
    prefill, decode = pair(net)
    prefill.offer("r")
    decode.pull("r", prefill.names("r"))
    [read] = decode.reads
    net.now += TTL  # the decode engine slept
    decode.end(read, 0)
    assert (decode.arrived, decode.quiet) == ([], ["r"])
    assert decode.failed == [("r", "the lease ended before the read did")]


def test_a_read_whose_claim_was_never_granted_is_thrown_away(net: Network) -> None:
    """What is announced in answer to the claim of an earlier pull may be of blocks that are gone by now."""
    prefill, decode = pair(net)
    decode.introduce(prefill)
    prefill.offer("r")
    sent: list[Claimed | KvComputed] = []
    net.lost = lambda message: isinstance(message, Claimed | KvComputed) and not sent.append(message)  # type: ignore[func-returns-value]
    decode.pull("one", prefill.names("r"))
    decode.give_up("one")
    decode.pull("two", prefill.names("r"))
    for late in sent:  # granted to the first pull, and on its way while the second one claims
        decode.pulls.received(1, late, net.now)
    decode.tick()
    assert decode.reads == []
    net.pass_time(TTL + 1)
    assert decode.arrived == []
    assert decode.quiet == ["one", "two"]


def test_an_engine_that_restarted_refuses_its_old_sessions(net: Network) -> None:
    first, decode = pair(net, ranks=2)
    decode.introduce(first)
    first.die()
    second = first.restart("second")
    decode.pull("r", first.names("r"))
    assert decode.quiet == ["r"]
    [(_, why)] = decode.failed
    assert "restarted" in why
    assert "second" in why
    assert decode.states() == ["lost"]
    assert len(decode.closed) == 1
    decode.introduce(second)
    second.offer("s")
    decode.pull("s", second.names("s"))
    assert len(decode.reads) == 1
    assert decode.states() == ["ready"], "the first incarnation is forgotten"
    assert second.heard["Hello"] == 1


def test_a_read_in_progress_outlives_its_session_and_then_is_quiet_once(net: Network) -> None:
    first, decode = pair(net, ranks=2)
    first.offer("r")
    decode.pull("r", first.names("r"))
    [read] = decode.reads
    first.die()
    first.restart("second")
    decode.pull("s", first.names("s"))
    assert len(decode.failed) == 2
    assert decode.quiet == ["s"]
    decode.end(read, 0, "closed")
    assert decode.quiet == ["s"]
    decode.end(read, 1)
    assert decode.quiet == ["s", "r"]
    assert sorted(request for request, _ in decode.failed) == ["r", "s"]
    assert decode.arrived == []


def test_an_engine_that_left_is_forgotten_once_nothing_is_read_from_it(net: Network) -> None:
    prefill, decode = pair(net)
    decode.introduce(prefill)
    prefill.offer("r")
    decode.pull("r", prefill.names("r"))
    decode.introduce()
    assert decode.states() == ["ready"]
    decode.end_reads()
    assert len(decode.arrived) == 1
    decode.introduce()
    assert decode.states() == []
    assert (len(decode.closed), decode.connected) == (1, {})


@pytest.mark.parametrize("state", ["connecting", "ready"])
def test_an_engine_that_left_and_does_not_answer_is_not_waited_for_as_long_as_a_lease(net: Network, state: str) -> None:
    prefill, decode = pair(net)
    if state == "connecting":
        prefill.die()
    decode.introduce(prefill)
    decode.pull("r", prefill.names("r"))
    if state == "ready":
        prefill.die()
    assert decode.states() == [state]
    decode.introduce()
    net.pass_time(DOUBT_SECONDS - 2 * TICK)
    decode.introduce()
    assert decode.failed == []
    net.pass_time(4 * TICK)
    assert decode.failed == [("r", "p0 has left, and does not answer")]
    assert decode.quiet == ["r"]
    decode.introduce()
    assert decode.states() == []


def test_an_engine_that_its_routers_have_lost_is_read_from_for_as_long_as_it_answers(net: Network) -> None:
    prefill, decode = pair(net)
    decode.introduce(prefill)
    prefill.offer("r")
    decode.pull("r", prefill.names("r"))
    for _ in range(3):
        decode.introduce()
        decode.introduce()
        net.pass_time(2 * DOUBT_SECONDS)
    assert decode.states() == ["ready"]
    decode.end_reads()
    assert (len(decode.arrived), decode.failed) == (1, [])


def test_an_engine_that_its_routers_have_found_again_is_not_doubted_any_more(net: Network) -> None:
    prefill, decode = pair(net)
    decode.introduce(prefill)
    decode.pull("r", prefill.names("r"))
    net.lost = lambda message: isinstance(message, Renewed)
    decode.introduce()
    decode.introduce(prefill)
    net.pass_time(2 * DOUBT_SECONDS)
    assert (decode.states(), decode.failed) == (["ready"], [])


def test_a_dead_engine_delays_no_other(net: Network) -> None:
    dead, alive, decode = net.prefill("p0"), net.prefill("p1"), net.decode(ranks=1)
    dead.die()
    decode.pull("r", dead.names("r"))
    for number in range(3):
        alive.offer(str(number))
        decode.pull(str(number), alive.names(str(number)))
    decode.end_reads()
    assert len(decode.arrived) == 3
    assert decode.states() == ["connecting", "ready"]  # nobody has waited for the dead one
    assert decode.failed == []


def test_an_announcement_that_was_lost_with_the_connection_is_asked_for_again(net: Network) -> None:
    prefill, decode = pair(net)
    decode.pull("r", prefill.names("r"))
    net.lost = lambda message: isinstance(message, KvComputed)
    prefill.offer("r")
    net.lost = lambda message: False
    assert decode.reads == []
    net.pass_time(TTL + 1)
    decode.end_reads()
    assert prefill.ended == ["r"]
    assert [pull.first_token for pull in decode.arrived] == [7]


# --- what clients and foreign proxies may say ----------------------------------------------------------------------


def test_a_wrong_address_does_not_harm_the_session_with_the_right_one(net: Network) -> None:
    prefill, decode = pair(net)
    decode.pull("r", prefill.names("r", address=Address("127.0.0.1", 9), foreign=True))
    decode.introduce(prefill)
    prefill.offer("s")
    decode.pull("s", prefill.names("s"))
    assert len(decode.reads) == 1
    assert sorted(decode.states()) == ["connecting", "ready"]


def test_sessions_with_and_without_a_known_incarnation_stand_side_by_side(net: Network) -> None:
    prefill, decode = pair(net)
    decode.introduce(prefill)
    prefill.offer("r")
    decode.pull("r", prefill.names("r", incarnation=None, foreign=True))
    assert len(decode.reads) == 1
    net.pass_time(3 * TTL)
    assert decode.states() == ["ready", "ready"]
    decode.end_reads()
    assert len(decode.arrived) == 1


def test_more_engines_than_there_may_be_fail_their_pulls_until_others_have_ended(
    net: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_INTRODUCED_SESSIONS", 1)
    first, second, decode = net.prefill("p0"), net.prefill("p1"), net.decode(ranks=1)
    decode.introduce(first)
    decode.pull("r", second.names("r"))
    assert decode.failed == [("r", "more than 1 prefill engines")]
    assert decode.quiet == ["r"]
    first.die()
    net.pass_time(TTL + 1)
    assert decode.states() == ["lost"]
    second.offer("s")
    decode.pull("s", second.names("s"))
    assert len(decode.reads) == 1


def test_engines_that_clients_name_take_no_place_from_those_of_the_router(
    net: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_FOREIGN_SESSIONS", 2)
    monkeypatch.setattr(module, "MAX_INTRODUCED_SESSIONS", 2)
    prefill, decode = pair(net)
    for port in range(1, 5):
        decode.pull(f"r{port}", prefill.names("r", address=Address("127.0.0.1", port), foreign=True))
    assert decode.failed == [
        (request_id, "it had not answered, and others need its place") for request_id in ("r1", "r2")
    ]
    decode.introduce(prefill, net.prefill("p1"))
    assert decode.states() == ["connecting", "connecting", "ready", "ready"]


def test_engines_that_are_in_use_do_not_give_way_to_those_that_clients_name(
    net: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_FOREIGN_SESSIONS", 2)
    engines, decode = [net.prefill(f"p{number}") for number in range(3)], net.decode(ranks=1)
    for number, engine in enumerate(engines):
        engine.offer("r")
        decode.pull(f"r{number}", engine.names("r", foreign=True))
    assert decode.failed == [("r2", "more than 2 prefill engines that clients named are in use")]
    assert decode.states() == ["ready", "ready"]


def test_however_many_engines_are_invented_sessions_stay_bounded_and_real_ones_are_read_from(net: Network) -> None:
    """2,000 requests at once, each with another engine that is not there; a real one is asked for all the while."""
    prefill, decode = pair(net)
    idle = net.prefill("idle")
    idle.offer("first")
    decode.pull("first", idle.names("first", foreign=True))
    decode.give_up("first")
    for number in range(2000):
        nowhere = prefill.names("r", engine_id=f"invented-{number}", address=Address("127.0.0.1", 1), foreign=True)
        decode.pull(f"bad{number}", nowhere)
        if number % 100 == 99:
            prefill.offer(f"r{number}")
            decode.pull(f"good{number}", prefill.names(f"r{number}", foreign=True))
            decode.end_reads()
        assert len(decode.peers) <= module.MAX_FOREIGN_SESSIONS
        assert len(decode.connected) <= module.MAX_FOREIGN_SESSIONS
    assert len(decode.arrived) == 20
    assert not [request_id for request_id, _ in decode.failed if request_id.startswith("good")]
    assert "ready" in [peer.state for peer in decode.peers if peer.engine_id == "idle"]
    net.pass_time(11.0)
    assert len(decode.failed) == 2000
    assert len(decode.quiet) == 2001


def test_a_foreign_session_that_nobody_uses_gives_way_the_one_that_ended_first(
    net: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_FOREIGN_SESSIONS", 2)
    engines, decode = [net.prefill(f"p{number}") for number in range(4)], net.decode(ranks=1)

    def ask(number: int) -> None:
        decode.pull(f"r{number}", engines[number].names("r", foreign=True))
        decode.give_up(f"r{number}")
        net.pass_time(0.5)

    ask(0)
    ask(1)
    engines[1].die()
    net.pass_time(TTL + 1)
    assert decode.states() == ["ready", "lost"]
    ask(2)
    assert [peer.engine_id for peer in decode.peers] == ["p0", "p2"]
    ask(3)
    assert [peer.engine_id for peer in decode.peers] == ["p2", "p3"]
    assert len(decode.connected) == 2


def test_a_foreign_session_that_ended_is_shown_for_a_while_and_then_forgotten(net: Network) -> None:
    prefill, decode = pair(net)
    decode.pull("r", prefill.names("r", engine_id="other", foreign=True))
    decode.introduce(prefill)
    net.pass_time(30.0)
    assert decode.states() == ["refused", "ready"]
    net.pass_time(60.0)
    assert decode.states() == ["ready"]


def test_kv_that_is_lost_after_its_last_chunk_leaves_the_first_token(net: Network) -> None:
    """The prefill engine has sent it to the client, so nobody may choose another."""
    prefill, decode = pair(net)
    for request_id in ("final", "early"):
        prefill.begin(request_id)
        decode.pull(request_id, prefill.names(request_id))
    prefill.chunk("final", 0, [5, 6], 8, True, 42)
    prefill.chunk("early", 0, [7], 4, False)
    for read in list(decode.reads):
        decode.end(read, 0, "connection reset")
    assert [request for request, _ in decode.failed] == ["final", "early"]
    assert decode.first_tokens == {"final": 42, "early": None}


def test_a_first_token_that_the_prefill_engine_does_not_send_is_not_passed_on(net: Network) -> None:
    prefill, decode = pair(net)
    prefill.offer("r")
    decode.pull("r", msgspec.structs.replace(prefill.names("r"), first_token=False))
    decode.end(decode.reads[0], 0, "connection reset")
    assert decode.first_tokens == {"r": None}
