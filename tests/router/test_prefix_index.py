"""Which engines hold the KV of which prefixes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tandem.router.prefix_index import CHUNK_TOKENS, PrefixIndex, prefix_keys

ROOM = 100 * CHUNK_TOKENS


def text(*chunks: int, rest: int = 0) -> list[int]:
    """Return a text of whole chunks, each of one token, and `rest` tokens more."""
    return [token for chunk in chunks for token in [chunk] * CHUNK_TOKENS] + [9] * rest


def index(*texts: tuple[str, list[int]], room: int = ROOM) -> PrefixIndex:
    made = PrefixIndex()
    for holder, tokens in texts:
        made.add(holder, prefix_keys(tokens), room)
    return made


def test_a_text_has_a_key_for_each_whole_chunk() -> None:
    assert prefix_keys([]) == prefix_keys(text(rest=CHUNK_TOKENS - 1)) == []
    assert len(prefix_keys(text(1))) == 1
    assert len(prefix_keys(text(1, 2, rest=CHUNK_TOKENS - 1))) == 2


def test_keys_speak_of_all_tokens_before() -> None:
    assert prefix_keys(text(1, 2))[0] == prefix_keys(text(1, 3))[0]
    assert not set(prefix_keys(text(1, 2))) & set(prefix_keys(text(2, 2)))
    assert not set(prefix_keys(text(1))) & set(prefix_keys(text(1), salt="tenant"))


def test_each_engine_matches_as_far_as_it_was_sent() -> None:
    made = index(("a", text(1, 2, 3)), ("b", text(1, 2, 4)), ("c", text(5)))
    assert made.matches(prefix_keys(text(1, 2, 3, 6, rest=5))) == {"a": 3 * CHUNK_TOKENS, "b": 2 * CHUNK_TOKENS}
    assert made.matches(prefix_keys(text(6))) == made.matches([]) == {}


def test_what_was_used_least_recently_is_dropped_first_and_its_end_before_its_beginning() -> None:
    made = index(("a", text(1, 2)), ("a", text(3)), ("a", text(4)), room=3 * CHUNK_TOKENS)
    assert made.matches(prefix_keys(text(1, 2))) == {"a": CHUNK_TOKENS}
    made.add("a", prefix_keys(text(1)), 3 * CHUNK_TOKENS)
    made.add("a", prefix_keys(text(5)), 3 * CHUNK_TOKENS)
    assert made.matches(prefix_keys(text(1))) == {"a": CHUNK_TOKENS}
    assert made.matches(prefix_keys(text(3))) == {}


def test_an_engine_that_left_holds_nothing() -> None:
    made = index(("a", text(1)), ("b", text(1, 2)))
    made.keep_only({"b"})
    assert made.matches(prefix_keys(text(1))) == {"b": CHUNK_TOKENS}
    made.keep_only(())
    assert len(made) == 0
    assert made.matches(prefix_keys(text(1))) == {}


@given(st.lists(st.tuples(st.integers(0, 6), st.lists(st.integers(0, 2), min_size=1, max_size=5))))
def test_no_engine_holds_more_than_it_has_room_for(added: list[tuple[int, list[int]]]) -> None:
    """An engine has room for as many chunks as its name says."""
    made = PrefixIndex()
    for holder, chunks in added:
        keys = prefix_keys(text(*chunks))
        made.add(str(holder), keys, holder * CHUNK_TOKENS + 1)
        assert made.matches(keys).get(str(holder), 0) == min(holder, len(chunks)) * CHUNK_TOKENS
    assert len(made) <= sum(range(7))
