"""Every message comes back as it was; whatever else comes is a WireError."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.errors import WireError
from tandem.ids import EngineIdentity
from tandem.transfer.thread import thread_messages as t
from tandem.wire import engine_status as s
from tandem.wire import messages as m
from tandem.wire import peer_messages as p
from tandem.wire.codec import Codec
from tandem.wire.control_messages import ChangeRole, DrainEngine
from tandem.wire.fields import MAX_TEXT, clip
from tandem.wire.sampling import MAX_LOGPROBS, SamplingParams

IDENTITY = EngineIdentity("p0", "incarnation")
ADDRESS = m.Address("127.0.0.1", 1)
ENVELOPE = p.Envelope((1, 2), "f", "float32", "tcp", "tandem 1")
STATUS = s.EngineStatus(
    "p0", "incarnation", "prefill", "m", "f", 1, 1, 1, "tcp", [s.RankInfo(0, 0, 0, "n", 1, "p0", "incarnation")],
    s.KvUsage(16, 8, 5, 1, 1, 1), s.RequestCounts(1, 2, 3), [s.PeerInfo("d0", "x", "lost", "gone", 0.5)],
    s.EngineCounters(requests=3),
)  # fmt: skip
TOKENS = m.Tokens(
    "r", 2, [5], [m.TokenLogprobs(-0.5, [(5, -0.5)])], "stop", 5, True, m.RequestStats(queue_time=0.5),
    m.KvTransferParams(do_remote_prefill=True, remote_block_ids=[1]),
)  # fmt: skip
SAMPLING = SamplingParams(logit_bias={3: 1.5}, stop_token_ids=[7], seed=2**63 - 1)

TO_ENGINE = [
    m.Registered(True),
    m.Generate("r", [1, 2], 2, SAMPLING, 5.0),
    m.Generate("r", [1], 1, SamplingParams(), 5.0, m.Prefill(published=True)),
    m.Generate("r", [1], 1, SamplingParams(), 5.0, m.PullKv("p0", None, ADDRESS, "r0", False, True)),
    m.Abort("r"),
    m.Introduce([m.PeerAddress(IDENTITY, ADDRESS)]),
    DrainEngine(),
    ChangeRole("mixed"),
]
TO_FRONTEND = [
    m.Register(IDENTITY, STATUS, ADDRESS, 100, 10, "/m", "float32", "1", (1, 2), 32, 60.0, 30.0, ADDRESS),
    STATUS,
    m.Outputs([TOKENS, m.Failed("r", "kv_lost", "why", "prompt", 1)]),
    m.Goodbye("stopped"),
]
TO_PREFILL = [
    p.Hello(ENVELOPE, IDENTITY, "p0"),
    p.Claim("incarnation", "r"),
    p.Renew("incarnation", 1, ["r"]),
    p.Release("incarnation", ["r", "s"]),
]
TO_DECODE = [
    p.Welcome(ENVELOPE, IDENTITY, 30.0, msgspec.Raw(b"\x01")),
    p.Refused(IDENTITY, "fingerprint", "a", "b"),
    p.Claimed("incarnation", "r"),
    p.KvComputed("incarnation", "r", 0, [1, 2], 20, True, 9),
    p.KvGone("incarnation", "r", "why"),
    p.Renewed("incarnation", 1, []),
]
TO_TRANSFER_THREAD = [
    t.OpenPeer(1, []),
    t.ClosePeer(1),
    t.ReadOrder(1, 1, "r", [1], [2], 0, 16, True),
    t.StopThread(),
    t.StopThread("it hangs"),
    t.LeaderAlive(),
]
FROM_TRANSFER_THREAD = [
    t.ThreadAlive(0),
    t.PeerOpened(0, 1, "why"),
    t.ReadEnded(0, 1, 2, 3, 0.5, None),
    t.ReadQuiet(0, 1),
]
CHANNELS: list[tuple[Any, list[Any]]] = [
    (m.ToEngine, TO_ENGINE),
    (m.ToFrontend, TO_FRONTEND),
    (p.ToPrefill, TO_PREFILL),
    (p.ToDecode, TO_DECODE),
    (t.ToTransferThread, TO_TRANSFER_THREAD),
    (t.FromTransferThread, FROM_TRANSFER_THREAD),
]
NAMES = ["to engine", "to frontend", "to prefill", "to decode", "to transfer thread", "from transfer thread"]
CODECS: list[Codec[Any]] = [Codec(union) for union, _ in CHANNELS]


@pytest.mark.parametrize(("union", "examples"), CHANNELS, ids=NAMES)
def test_every_message_of_a_channel_comes_back_as_it_was(union: Any, examples: list[Any]) -> None:
    assert {type(example) for example in examples} == set(get_args(union)), "an example is missing"
    codec: Codec[Any] = Codec(union)
    for example in examples:
        assert codec.decode(codec.encode(example)) == example


@pytest.mark.parametrize(("codec", "others"), [*zip(CODECS, reversed(CHANNELS), strict=True)], ids=NAMES)
def test_messages_of_another_channel_are_refused(codec: Codec[Any], others: tuple[Any, list[Any]]) -> None:
    for example in others[1]:
        with pytest.raises(WireError):
            codec.decode(codec.encode(example))


def decodes_or_is_refused(codec: Codec[Any], data: bytes) -> None:
    try:
        message = codec.decode(data)
    except WireError:
        return
    assert codec.decode(codec.encode(message)) == message


@given(st.sampled_from(CODECS), st.binary(max_size=200))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_a_message_or_a_wire_error(codec: Codec[Any], data: bytes) -> None:
    decodes_or_is_refused(codec, data)


EXAMPLES = [(codec, codec.encode(e)) for codec, (_, es) in zip(CODECS, CHANNELS, strict=True) for e in es]


@given(st.sampled_from(EXAMPLES), st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_message_is_a_message_or_a_wire_error(example: tuple[Codec[Any], bytes], data: st.DataObject) -> None:
    codec, good = example
    start = data.draw(st.integers(0, len(good)))
    stop = data.draw(st.integers(start, min(len(good), start + 4)))
    decodes_or_is_refused(codec, good[:start] + data.draw(st.binary(max_size=6)) + good[stop:])


@given(st.sampled_from(EXAMPLES), st.data())
@settings(max_examples=100, deadline=None)
def test_a_message_that_was_cut_short_is_refused(example: tuple[Codec[Any], bytes], data: st.DataObject) -> None:
    codec, good = example
    with pytest.raises(WireError):
        codec.decode(good[: data.draw(st.integers(0, len(good) - 1))])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() |
    st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@given(st.sampled_from(EXAMPLES), st.data())
@settings(max_examples=300, deadline=None)
def test_a_field_of_another_type_or_range_is_a_message_or_a_wire_error(
    example: tuple[Codec[Any], bytes], data: st.DataObject
) -> None:
    codec, good = example
    fields = msgspec.msgpack.decode(good)
    key = data.draw(st.sampled_from(sorted(fields)))
    try:
        message = codec.decode(msgspec.msgpack.encode(fields | {key: data.draw(VALUES)}))
    except WireError:
        return
    codec.encode(message)


HOSTILE = {
    "an array of four billion items": b"\x83\xa4type\xa7release\xa2to\xa1x\xabrequest_ids\xdd\xff\xff\xff\xff",
    "a map of four billion keys": b"\xdf\xff\xff\xff\xff",
    "deep nesting in an unknown field": b"\x82\xa1z" + b"\x91" * 100_000,
    "text that is not UTF-8": b"\x83\xa4type\xa5claim\xa2to\xa2\xff\xfe\xaarequest_id\xa1r",
    "two tags": b"\x84\xa4type\xa5claim\xa4type\xa5renew\xa2to\xa1x\xaarequest_id\xa1r",
    "an extension type": b"\x83\xa4type\xa5claim\xa2to\xd6\xff\0\0\0\0\xaarequest_id\xa1r",
    "nothing": b"",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_bytes_are_a_wire_error(data: bytes) -> None:
    with pytest.raises(WireError):
        Codec(p.ToPrefill).decode(data)


def test_a_message_over_the_limit_is_refused_unread() -> None:
    codec: Codec[Any] = Codec(p.ToPrefill, limit=20)
    with pytest.raises(WireError, match="at most 20"):
        codec.decode(codec.encode(p.Claim("incarnation", "a request with a long name")))


def generate(**fields: Any) -> m.Generate:
    return msgspec.structs.replace(m.Generate("r", [1], 1, SamplingParams(), 1.0), **fields)


OUT_OF_BOUNDS = [
    (m.ToEngine, generate(request_id="")),
    (m.ToEngine, generate(request_id="r" * 257)),
    (m.ToEngine, generate(token_ids=[])),
    (m.ToEngine, generate(token_ids=[-1])),
    (m.ToEngine, generate(token_ids=[2**31])),
    (m.ToEngine, generate(prompt_len=0)),
    (m.ToEngine, generate(time_left=-1.0)),
    (m.ToEngine, generate(time_left=float("nan"))),
    (m.ToEngine, generate(sampling=SamplingParams(max_tokens=0))),
    (m.ToEngine, generate(sampling=SamplingParams(temperature=float("nan")))),
    (m.ToEngine, generate(sampling=SamplingParams(top_p=0.0))),
    (m.ToEngine, generate(sampling=SamplingParams(logprobs=MAX_LOGPROBS + 1))),
    (m.ToEngine, generate(sampling=SamplingParams(logit_bias={1: 101.0}))),
    (m.ToEngine, generate(kv=m.PullKv("p", None, m.Address("h", 0), "r"))),
    (m.ToEngine, generate(kv=m.PullKv("p", None, m.Address("h", 65536), "r"))),
    (m.ToEngine, m.Introduce([m.PeerAddress(IDENTITY, ADDRESS)] * (s.MAX_PEERS + 1))),
    (m.ToEngine, m.Introduce([m.PeerAddress(EngineIdentity("", "incarnation"), ADDRESS)])),
    (m.ToEngine, m.Introduce([m.PeerAddress(EngineIdentity("p0", "i" * 257), ADDRESS)])),
    (p.ToPrefill, p.Claim("", "r")),
    (p.ToPrefill, p.Renew("x", -1, [])),
    (p.ToPrefill, p.Renew("x", 1, ["r"] * (p.MAX_BATCH + 1))),
    (p.ToPrefill, p.Hello(msgspec.structs.replace(ENVELOPE, fingerprint="f" * 4097), IDENTITY, "p0")),
    (p.ToDecode, p.KvComputed("x", "r", -1, [], 0, False)),
    (p.ToDecode, p.KvComputed("x", "r", 0, [-1], 0, False)),
    (p.ToDecode, p.KvComputed("x", "r", 0, [], 0, True, 2**31)),
    (p.ToDecode, p.Welcome(ENVELOPE, IDENTITY, -1.0, msgspec.Raw(b"\x01"))),
]


@pytest.mark.parametrize(("union", "message"), OUT_OF_BOUNDS)
def test_a_value_out_of_bounds_is_refused(union: Any, message: Any) -> None:
    codec: Codec[Any] = Codec(union)
    with pytest.raises(WireError):
        codec.decode(codec.encode(message))


@pytest.mark.parametrize("length", [0, MAX_TEXT, MAX_TEXT + 1, 10 * MAX_TEXT])
def test_a_text_of_any_length_fits_a_message_once_it_is_clipped(length: int) -> None:
    text = clip("x" * length)
    assert (
        Codec(s.PeerInfo).decode(Codec(s.PeerInfo).encode(s.PeerInfo("p", "incarnation", "lost", text))).error == text
    )
    assert text[:4000] == ("x" * length)[:4000]
