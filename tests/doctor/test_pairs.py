"""What is said of pairs of engines."""

from __future__ import annotations

import msgspec
import pytest

from tandem.doctor.engines import EngineView, PeerView, RankView
from tandem.doctor.pairs import Pair, PairState, no_path, pairs
from tandem.errors import PeerRefused

PREFILL = EngineView("p", "p1", "prefill", peer_address="10.0.0.1:4000", model="m", dtype="bfloat16", version="1",
                     ranks=[RankView("n1")])  # fmt: skip
DECODE = EngineView("d", "d1", "decode", model="m", dtype="float16", version="2", ranks=[RankView("n2")])
MIXED = EngineView("x", "x1", "mixed")


def pair(state: str | None, error: str | None = None, **changed: str) -> Pair:
    peers = [PeerView("p", "p1", state, error)] if state else []
    prefill = msgspec.structs.replace(PREFILL, **changed)
    [found] = pairs([prefill, msgspec.structs.replace(DECODE, peers=peers)])
    return found


def refused(field: str, ours: str, theirs: str, **changed: str) -> str:
    found = pair("refused", str(PeerRefused(field, ours, theirs)), **changed)
    assert found.state is PairState.REFUSED
    assert found.why is not None
    assert f"d has {ours[:12]}" in found.why
    assert f"p has {theirs[:12]}" in found.why
    assert found.advice is not None
    return found.advice


def test_a_pair_that_is_ready_needs_no_words() -> None:
    found = pair("ready")
    assert (found.state, found.why, found.advice) == (PairState.READY, None, None)


def test_other_weights_of_one_model_ask_for_one_folder_or_revision() -> None:
    advice = refused("fingerprint", "a" * 64, "b" * 64)
    assert "same folder" in advice
    assert "revision" in advice


def test_other_models_are_told_apart_from_other_weights() -> None:
    assert "different models, other and m" in refused("fingerprint", "a" * 64, "b" * 64, model="other")


@pytest.mark.parametrize(("field", "words"), [
    ("kv_dtype", "same --dtype"), ("connector", "same --connector"), ("protocol", "upgrade"), ("layout", "report it"),
    ("incarnation", "another life"), ("engine_id", "--engine-id"), ("something new", "same version"),
])  # fmt: skip
def test_each_field_has_its_remedy(field: str, words: str) -> None:
    if " " in field:
        assert "how the two engines were started" in (pair("refused", "no words that are known").advice or "")
    else:
        assert words in refused(field, "1 to 1", "2 to 3")


def test_a_lost_pair_with_a_loopback_address_says_to_set_host() -> None:
    found = pair("lost", "no answer from p at 127.0.0.1:4000 in 10 s", peer_address="127.0.0.1:4000")
    assert found.state is PairState.LOST
    assert "--host" in (found.advice or "")


def test_a_lost_pair_speaks_of_the_firewall_or_of_ucx() -> None:
    assert "firewall" in (pair("lost", "no answer from p at 10.0.0.1:4000 in 10 s").advice or "")
    assert "UCX_NET_DEVICES" in (pair("lost", "NIXL cannot connect to p/0: remote disconnect").advice or "")


def test_a_handshake_that_has_not_been_made_is_waited_for() -> None:
    assert pair(None).state is PairState.WAITING
    assert pair("connecting").state is PairState.WAITING


def test_a_session_with_an_earlier_life_does_not_count() -> None:
    [found] = pairs([PREFILL, msgspec.structs.replace(DECODE, peers=[PeerView("p", "p0", "ready")])])
    assert found.state is PairState.WAITING


def test_an_engine_that_is_lost_makes_no_pair_whatever_was_said_last() -> None:
    lost = msgspec.structs.replace(PREFILL, state="lost")
    [found] = pairs([lost, msgspec.structs.replace(DECODE, peers=[PeerView("p", "p1", "ready")])])
    assert found.state is PairState.ABSENT
    assert found.why == "p is lost"


def test_there_is_a_path_over_a_ready_pair_or_a_mixed_engine() -> None:
    assert no_path([PREFILL, DECODE], [pair("ready")]) is None
    assert no_path([MIXED], []) is None


def test_without_a_path_it_is_said_what_is_missing() -> None:
    assert "no engine has registered" in (no_path([], []) or "")
    assert no_path([PREFILL], []) == "no decode engine is ready, and no mixed one"
    assert "refused or lost" in (no_path([PREFILL, DECODE], [pair("refused", "x")]) or "")
