"""What makes two engines fit, and what is said when they do not."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.errors import PeerRefused, WireError
from tandem.ids import EngineIdentity
from tandem.transfer.handshake import EngineDescriptor, check_envelopes, decode_descriptor, peers_needed
from tandem.transfer.transports.base import Region
from tests.transfer.engines import ENVELOPE, descriptor

WHO = EngineIdentity("p0", "first")
RANGES = st.tuples(st.integers(0, 5), st.integers(0, 5)).filter(lambda r: r[0] <= r[1])


def encoded(value: Any) -> msgspec.Raw:
    return msgspec.Raw(msgspec.msgpack.encode(value))


@given(RANGES, RANGES)
@settings(max_examples=60, deadline=None)
def test_two_ranges_of_versions_fit_if_they_share_one_and_the_highest_is_taken(
    ours: tuple[int, int], theirs: tuple[int, int]
) -> None:
    mine, yours = (msgspec.structs.replace(ENVELOPE, protocol=versions) for versions in (ours, theirs))
    shared = set(range(ours[0], ours[1] + 1)) & set(range(theirs[0], theirs[1] + 1))
    if shared:
        assert check_envelopes(mine, yours) == check_envelopes(yours, mine) == max(shared)
    else:
        with pytest.raises(PeerRefused) as refusal:
            check_envelopes(mine, yours)
        text = str(refusal.value)
        assert refusal.value.field == "protocol"
        assert f"{ours[0]} to {ours[1]}" in text
        assert f"{theirs[0]} to {theirs[1]}" in text


@pytest.mark.parametrize("field", ["fingerprint", "kv_dtype", "connector"])
def test_a_difference_that_matters_is_refused_with_both_values(field: str) -> None:
    with pytest.raises(PeerRefused) as refusal:
        check_envelopes(ENVELOPE, msgspec.structs.replace(ENVELOPE, **{field: "other"}))
    error = refusal.value
    assert (error.field, error.ours, error.theirs) == (field, getattr(ENVELOPE, field), "other")


def test_other_software_within_the_protocol_is_accepted() -> None:
    assert check_envelopes(ENVELOPE, msgspec.structs.replace(ENVELOPE, software="tandem 9", protocol=(2, 7))) == 2


def test_a_descriptor_comes_back_as_it_was() -> None:
    described = descriptor(WHO, tp=2, pp=2)
    assert decode_descriptor(encoded(described)) == described


def damaged(**fields: Any) -> Any:
    """A descriptor of plain values, with some of its first rank's replaced."""
    plain = msgspec.to_builtins(descriptor(WHO, tp=2))
    plain["ranks"][0] |= fields
    return plain


def test_a_layout_that_reaches_beyond_the_registered_memory_is_refused() -> None:
    described = descriptor(WHO)
    rank = described.ranks[0]
    endpoint = msgspec.structs.replace(rank.endpoint, region=Region(0, rank.layout.nbytes - 1))
    short = EngineDescriptor(WHO, described.block_size, [msgspec.structs.replace(rank, endpoint=endpoint)])
    with pytest.raises(WireError, match="registered only"):
        decode_descriptor(encoded(short))


@pytest.mark.parametrize("ranks", [[0, 0], [1, 0], [1, 2]])
def test_ranks_that_are_not_counted_from_zero_are_refused(ranks: list[int]) -> None:
    described = descriptor(WHO, tp=2)
    listed = [msgspec.structs.replace(r, rank=n) for r, n in zip(described.ranks, ranks, strict=True)]
    with pytest.raises(WireError, match="0 to 1 in order"):
        decode_descriptor(encoded(EngineDescriptor(WHO, described.block_size, listed)))


def test_another_block_size_than_the_engine_says_is_refused() -> None:
    with pytest.raises(WireError, match="block size"):
        decode_descriptor(encoded(EngineDescriptor(WHO, 8, descriptor(WHO, block_size=4).ranks)))


@pytest.mark.parametrize(
    "fields",
    [{"layout": None}, {"rank": -1}, {"endpoint": []}, {"node": 5}, {"layout": {"dimensions": [], "itemsize": 4}}],
)
def test_a_descriptor_that_cannot_be_read_is_a_wire_error(fields: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        decode_descriptor(encoded(damaged(**fields)))


def test_a_layout_that_contradicts_itself_is_a_wire_error() -> None:
    plain = msgspec.to_builtins(descriptor(WHO))
    plain["ranks"][0]["layout"]["dimensions"][0]["stride"] = 1
    with pytest.raises(WireError):
        decode_descriptor(encoded(plain))


@given(st.binary(max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_other_bytes_are_a_wire_error(data: bytes) -> None:
    with pytest.raises(WireError):
        decode_descriptor(msgspec.Raw(data))


def test_text_that_is_no_utf8_and_nesting_without_end_are_wire_errors() -> None:
    plain = encoded(descriptor(WHO))
    for damage in (bytes(plain).replace(b"node", b"\xff\xff\xff\xff", 1), b"\x91" * 100_000):
        with pytest.raises(WireError):
            decode_descriptor(msgspec.Raw(damage))


def test_an_engine_without_ranks_is_refused() -> None:
    with pytest.raises(WireError):
        decode_descriptor(encoded(EngineDescriptor(WHO, 4, [])))


def test_a_reader_is_given_only_the_ranks_that_it_reads_from() -> None:
    sources = descriptor(WHO, tp=4).ranks
    layouts = [r.layout for r in descriptor(WHO, tp=2).ranks]
    assert [[r.rank for r in needed] for needed in peers_needed(sources, layouts)] == [[0, 1], [2, 3]]


def test_an_engine_that_lacks_what_a_reader_needs_is_refused() -> None:
    sources = descriptor(WHO, tp=4).ranks[:3]
    with pytest.raises(PeerRefused, match="one that holds heads"):
        peers_needed(sources, [r.layout for r in descriptor(WHO, tp=2).ranks])
