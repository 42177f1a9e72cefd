"""A prefill engine that says anything at all costs the sessions and pulls that are its own, and holds us to nothing."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.errors import WireError
from tandem.kv.layout import MOST_BYTES, latent
from tandem.kv.lease import MAX_TTL, MIN_TTL
from tandem.kv.shard import shard
from tandem.transfer.handshake import decode_descriptor
from tandem.transfer.transports.base import MAX_METADATA, RankEndpoint, Region
from tandem.wire.codec import Codec
from tandem.wire.peer_messages import Claimed, KvComputed, KvGone, Renewed, ToDecode
from tests.transfer.engines import descriptor
from tests.transfer.pair import Decode, Network, Prefill

CODEC: Codec[ToDecode] = Codec(ToDecode)


def pair() -> tuple[Network, Prefill, Decode]:
    net = Network()
    return net, net.prefill(), net.decode(ranks=1)


# --- the welcome ---------------------------------------------------------------------------------------------------


def welcomed(**changes: Any) -> Decode:
    """As it comes over the wire; a message that cannot be decoded ends the handshake."""
    _, prefill, decode = pair()
    message = msgspec.structs.replace(prefill.welcome, **changes)
    try:
        CODEC.decode(CODEC.encode(message))
    except WireError as error:
        prefill.die()
        decode.introduce(prefill)
        decode.pulls.unreadable(1, error, 0.0)
    else:
        prefill.welcome = message
        decode.introduce(prefill)
    return decode


@pytest.mark.parametrize("ttl", [MIN_TTL, MAX_TTL])
def test_a_lease_at_either_bound_is_welcome(ttl: float) -> None:
    assert welcomed(lease_ttl=ttl).states() == ["ready"]


@pytest.mark.parametrize("ttl", [0.0, MIN_TTL - 0.001, MAX_TTL + 1, 1e9, math.nan, math.inf, -1.0])
def test_a_lease_that_makes_no_sense_is_no_welcome(ttl: float) -> None:
    assert welcomed(lease_ttl=ttl).states() == ["lost"]


REGION = st.builds(
    Region,
    st.sampled_from([0, 1, 2**62 - 1, 2**62, 2**63, 2**64 - 1, -1]),
    st.sampled_from([0, 1, 4096, MOST_BYTES, MOST_BYTES + 1, 2**63, 2**64 - 1, -1]),
    st.sampled_from([-1, 0, 1023, 1024, 2**32, -2]),
)
ENDPOINTS = st.builds(
    RankEndpoint,
    st.sampled_from(["", "a", "a" * 1024, "a" * 1025]),
    st.sampled_from([b"", b"m", bytes(MAX_METADATA + 1)]),
    REGION,
)


@given(
    ENDPOINTS,
    st.sampled_from([None, 0, 128, MOST_BYTES, MOST_BYTES + 1, 2**64 - 1, -1]),
    st.sampled_from([0, 1, 4, 2**63]),
)
@settings(max_examples=200, deadline=None)
def test_a_description_of_absurd_sizes_is_a_wire_error_or_lies_within_bounds(
    endpoint: RankEndpoint, checksums: int | None, block_size: int
) -> None:
    _, prefill, _ = pair()
    plain = descriptor(prefill.identity)
    rank = msgspec.structs.replace(plain.ranks[0], endpoint=endpoint, checksums=checksums)
    hostile = msgspec.structs.replace(plain, ranks=[rank], block_size=block_size)
    try:
        taken = decode_descriptor(msgspec.Raw(msgspec.msgpack.encode(hostile)))
    except WireError:
        return
    region = taken.ranks[0].endpoint.region
    assert 0 <= region.address < 2**62
    assert taken.ranks[0].layout.nbytes <= region.length <= MOST_BYTES
    assert checksums is None or checksums <= region.length


def test_a_table_of_checksums_that_no_memory_could_hold_is_a_wire_error() -> None:
    """It is eight times as large as KV of one byte a token."""
    _, prefill, _ = pair()
    plain = descriptor(prefill.identity)
    one = shard(1, 1, tp=1, pp=1, tp_rank=0, pp_rank=0)
    layout = latent(one, blocks=2**47, block_size=4, latent_dim=1, itemsize=1)
    endpoint = RankEndpoint("p", b"", Region(0, MOST_BYTES))
    rank = msgspec.structs.replace(plain.ranks[0], layout=layout, endpoint=endpoint, checksums=0)
    hostile = msgspec.structs.replace(plain, ranks=[rank])
    with pytest.raises(WireError, match="layout of rank 0"):
        decode_descriptor(msgspec.Raw(msgspec.msgpack.encode(hostile)))


# --- what is announced ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "blocks", "tokens"),
    [
        (0, [8], 4),
        (0, [2**64 - 1], 4),
        (0, [0, 1, 2], 8),
        (0, [0, 1], 9),
        (0, [0], 8),
        (1, [0], 4),
        (2**63, [0], 4),
        (0, list(range(8)) * 1000, 8),
    ],
)
def test_blocks_that_cannot_be_this_prompts_fail_the_pull_at_once_and_alone(
    first: int, blocks: list[int], tokens: int
) -> None:
    """The prompt has 8 tokens; the engine has 8 blocks of 4."""
    _, prefill, decode = pair()
    prefill.begin("r")
    decode.open("r", prefill.names("r"))
    decode.open("other", prefill.names("other"))
    before = decode.failed.copy()
    decode.pulls._pulls["r"].wanted = 8
    prefill.answer(_client(prefill), KvComputed(prefill.identity.incarnation, "r", first, blocks, tokens, False))
    prefill._act()
    assert [request_id for request_id, _ in decode.failed[len(before) :]] == ["r"]
    assert decode.states() == ["ready"]
    assert decode.reads == []
    assert decode.quiet == ["r"]


def _client(prefill: Prefill) -> bytes:
    return next(iter(prefill._readers))


NAMES = st.sampled_from(["r", "s", "unknown"])
COUNTS = st.one_of(st.integers(0, 20), st.sampled_from([2**31, 2**63, 2**64 - 1]))
ANYTHING = st.one_of(
    st.builds(Claimed, st.just("first"), NAMES, COUNTS),
    st.builds(
        KvComputed,
        st.just("first"),
        NAMES,
        COUNTS,
        st.lists(COUNTS, max_size=5),
        COUNTS,
        st.booleans(),
        st.none() | st.integers(0, 2**31 - 1),
    ),
    st.builds(KvGone, st.just("first"), NAMES, st.text(max_size=5)),
    st.builds(Renewed, st.just("first"), COUNTS, st.lists(NAMES, max_size=3)),
    st.builds(Claimed, st.just("another life"), NAMES, COUNTS),
)


@given(st.lists(ANYTHING, max_size=25), st.booleans())
@settings(max_examples=200, deadline=None)
def test_whatever_a_peer_says_every_pull_ends_and_what_is_kept_of_it_is_bounded(
    messages: list[ToDecode], allocate: bool
) -> None:
    net, prefill, decode = pair()
    for request_id in ("r", "s"):
        decode.pulls.open(request_id, prefill.names(request_id), None, net.now, 8)
    decode._act()
    if allocate:
        for request_id in ("r", "s"):
            decode.pulls.allocated(request_id, [0, 1, 2], 0, 8)
    decode._act()
    for message in messages:
        prefill.answer(_client(prefill), message)
        prefill._act()
        for pull in decode.pulls._pulls.values():
            assert len(pull.source_blocks) <= 2 + 5, "more than the prompt has and one message brings"
        for order in decode.reads:
            assert max(order.source_blocks) < 8
            assert order.stop <= 8
    decode.end_reads()
    prefill.die()
    net.pass_time(25.0)
    over = {pull.request_id for pull in decode.arrived} | {request_id for request_id, _ in decode.failed}
    assert over == {"r", "s"}
    assert len(decode.arrived) + len(decode.failed) == 2
    assert len(decode.pulls) == 0


# --- verified reads ------------------------------------------------------------------------------------------------


def test_an_engine_without_checksums_is_refused_by_one_that_verifies() -> None:
    net, prefill, _ = pair()
    decode = net.decode("verifying", ranks=1)
    decode.pulls._verify = True
    decode.introduce(prefill)
    assert decode.states() == ["refused"]
    refusal = decode.peers[0].refusal
    assert refusal is not None
    assert (refusal.field, refusal.ours, refusal.theirs) == ("verify_kv", "on", "off")


def test_bytes_that_do_not_fit_fail_the_pull_alone_and_the_engine_is_told_that_they_are_damaged() -> None:
    _, prefill, decode = pair()
    for request_id in ("r", "s"):
        prefill.offer(request_id)
        decode.pull(request_id, prefill.names(request_id))
    first, second = decode.reads
    decode.end(first, 0, "1 checksums do not fit", corrupt=True)
    assert decode.failed == [("r", "1 checksums do not fit")]
    assert (decode.pulls.corrupt, prefill.corrupt, prefill.ended) == (1, ["r"], ["r"])
    decode.end(second, 0)
    assert [pull.request_id for pull in decode.arrived] == ["s"]
    assert (prefill.corrupt, prefill.ended) == (["r"], ["r", "s"])
