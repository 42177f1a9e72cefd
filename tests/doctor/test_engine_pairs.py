"""What is said of pairs of engines."""

from __future__ import annotations

import msgspec
import pytest

from tandem.doctor.engine_pairs import ListedEngine, Pair, PairState, engine_pairs, why_unserved
from tandem.wire.engine_status import KvUsage, PeerInfo, RankInfo, Refusal, RequestCounts


def engine(engine_id: str, role: str, *, peers: tuple[PeerInfo, ...] = (), dtype: str = "?") -> ListedEngine:
    """An engine of one rank on a node of its own."""
    incarnation, node = f"{engine_id}1", f"node-{engine_id}"
    return ListedEngine(
        engine_id=engine_id,
        incarnation=incarnation,
        role=role,
        model="m",
        fingerprint="f",
        tp=1,
        pp=1,
        nnodes=1,
        connector="nixl",
        ranks=[RankInfo(0, 0, 0, node, 1, engine_id, incarnation)],
        kv=KvUsage(16, 0, 0, 0, 0, 0),
        requests=RequestCounts(),
        peers=list(peers),
        state="ready",
        dtype=dtype,
        version="1",
        peer_address="10.0.0.1:4000",
    )


PREFILL = engine("p", "prefill", dtype="bfloat16")
DECODE = engine("d", "decode", dtype="float16")


def pair(state: str | None, error: str | None = None, refusal: Refusal | None = None, **changed: str) -> Pair:
    peers = (PeerInfo("p", "p1", state, error, refusal=refusal),) if state else ()
    prefill = msgspec.structs.replace(PREFILL, **changed)
    [found] = engine_pairs([prefill, engine("d", "decode", peers=peers, dtype="float16")])
    return found


def refused(field: str, ours: str, theirs: str, **changed: str) -> str:
    """The advice about a decode engine that refused because of `field`."""
    found = pair("refused", "in words", Refusal(field, ours, theirs), **changed)
    assert found.state is PairState.REFUSED
    assert f"d has {ours[:12]}" in found.why
    assert f"p has {theirs[:12]}" in found.why
    assert "in words" not in found.why
    return found.advice


def test_a_pair_that_is_ready_needs_no_words() -> None:
    found = pair("ready")
    assert (found.state, found.why, found.advice) == (PairState.READY, "", "")


def test_other_weights_of_one_model_ask_for_one_folder_or_revision() -> None:
    advice = refused("fingerprint", "a" * 64, "b" * 64)
    assert "same folder" in advice
    assert "revision" in advice


def test_other_models_are_told_apart_from_other_weights() -> None:
    assert "different models, other and m" in refused("fingerprint", "a" * 64, "b" * 64, model="other")


@pytest.mark.parametrize(("field", "words"), [
    ("kv_dtype", "p has bfloat16, d float16"), ("connector", "same --connector"), ("protocol", "upgrade"),
    ("layout", "p (tp 1, pp 1) does not fill that of d"), ("incarnation", "another incarnation"),
    ("engine_id", "--engine-id"), ("something_new", "same version"),
])  # fmt: skip
def test_each_field_has_its_remedy(field: str, words: str) -> None:
    assert words in refused(field, "1 to 1", "2 to 3")


def test_values_with_braces_are_shown_and_not_filled_in() -> None:
    assert "{p.tp}" in pair("refused", refusal=Refusal("layout", "{p.tp}", "x")).why


def test_a_refusal_without_a_field_is_shown_in_the_engines_words() -> None:
    found = pair("refused", "no words that are known")
    assert found.why == "no words that are known"
    assert "how the two engines were started" in found.advice


def test_a_lost_pair_with_a_loopback_address_says_to_set_host() -> None:
    found = pair("lost", "no answer from p at 127.0.0.1:4000 in 10 s", peer_address="127.0.0.1:4000")
    assert found.state is PairState.LOST
    assert "--host" in found.advice


def test_a_lost_pair_speaks_of_the_firewall_or_of_ucx() -> None:
    assert "firewall" in pair("lost", "no answer from p at 10.0.0.1:4000 in 10 s").advice
    assert "UCX_NET_DEVICES" in pair("lost", "NIXL cannot connect to p/0: remote disconnect").advice


def test_a_handshake_that_has_not_been_made_is_waited_for() -> None:
    assert pair(None).state is PairState.WAITING
    assert pair("connecting").state is PairState.WAITING


def test_a_session_with_an_earlier_incarnation_does_not_count() -> None:
    [found] = engine_pairs([PREFILL, engine("d", "decode", peers=(PeerInfo("p", "p0", "ready"),))])
    assert found.state is PairState.WAITING


def test_an_engine_that_is_lost_makes_no_pair_whatever_was_said_last() -> None:
    lost = msgspec.structs.replace(PREFILL, state="lost")
    [found] = engine_pairs([lost, engine("d", "decode", peers=(PeerInfo("p", "p1", "ready"),))])
    assert found.state is PairState.ABSENT
    assert found.why == "p is lost"


def test_there_is_a_path_over_a_ready_pair_or_a_mixed_engine() -> None:
    assert why_unserved([PREFILL, DECODE], [pair("ready")]) is None
    assert why_unserved([engine("x", "mixed")], []) is None


def test_without_a_path_it_is_said_what_is_missing() -> None:
    assert "no engine has registered" in (why_unserved([], []) or "")
    assert why_unserved([DECODE], []) is None, "it serves alone"
    assert why_unserved([PREFILL], []) == "no decode engine is ready, and no mixed one"
    assert "refused or lost" in (why_unserved([PREFILL, DECODE], [pair("refused", "x")]) or "")
