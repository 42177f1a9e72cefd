import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tandem.api.detokenizer import ByteDetokenizer, WindowDetokenizer, new_detokenizer
from tandem.api.tokenizer import Tokenizer
from tests.api.conftest import EOS, byte_fallback, byte_level, token_id

BYTES = Tokenizer(byte_level())
FALLBACK = Tokenizer(byte_fallback())


def texts(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    detokenizer = new_detokenizer(tokenizer)
    return [*map(detokenizer.push, token_ids), detokenizer.finish()]


@pytest.mark.parametrize("tokenizer", [BYTES, FALLBACK])
def test_special_tokens_are_shown_where_that_is_asked_for(tokenizer: Tokenizer) -> None:
    special = min(tokenizer.special_ids)
    token_ids = [*tokenizer.encode("a", add_special_tokens=False), special]
    detokenizer = new_detokenizer(tokenizer, skip_special_tokens=False)
    text = "".join([*map(detokenizer.push, token_ids), detokenizer.finish()])
    assert text == tokenizer.decode(token_ids, skip_special_tokens=False)
    assert text.endswith(tokenizer.token_text(special))
    assert "".join(texts(tokenizer, token_ids)) == tokenizer.decode(token_ids) != text


def test_each_kind_of_tokenizer_gets_its_detokenizer() -> None:
    assert isinstance(new_detokenizer(BYTES), ByteDetokenizer)
    assert isinstance(new_detokenizer(FALLBACK), WindowDetokenizer)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, BYTES.vocab_size + 2), max_size=40))
def test_a_byte_level_stream_is_the_text_of_all_its_tokens_whatever_they_are(token_ids: list[int]) -> None:
    assert "".join(texts(BYTES, token_ids)) == BYTES.decode(token_ids)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_a_byte_level_stream_of_a_text_shows_no_broken_character_on_its_way(text: str) -> None:
    parts = texts(BYTES, list(byte_level_ids(text)))
    assert "".join(parts) == text
    assert "\ufffd" in text or not any("\ufffd" in part for part in parts)


def byte_level_ids(text: str) -> list[int]:
    return _RAW.encode(text, add_special_tokens=False).ids


_RAW = byte_level()
_RAW_FALLBACK = byte_fallback()
_WORDS = st.one_of(
    st.text(max_size=3).map(lambda text: [FALLBACK_BYTES + byte for byte in text.encode()]),
    st.integers(259, FALLBACK.vocab_size - 1).map(lambda i: [i]),
    st.integers(0, 2).map(lambda i: [i]),
)
FALLBACK_BYTES = 3


@settings(max_examples=300, deadline=None)
@given(st.lists(_WORDS, max_size=20).map(lambda words: [i for word in words for i in word]))
@example([FALLBACK_BYTES + byte for byte in "\ufffd\u0800".encode()])  # U+FFFD is a character like any other
def test_a_byte_fallback_stream_is_the_text_of_all_its_tokens(token_ids: list[int]) -> None:
    assert "".join(texts(FALLBACK, token_ids)) == FALLBACK.decode(token_ids)


FALLBACK_THE = [token_id(_RAW_FALLBACK, "\u2581the")]


def test_bytes_that_are_no_character_do_not_keep_back_the_text_after_them() -> None:
    parts = texts(FALLBACK, [FALLBACK_BYTES + 0xFF] * 9 + FALLBACK_THE)
    assert "".join(parts) == "\ufffd" * 9 + " the"
    assert "".join(parts[:6]) == "\ufffd" * 5


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, FALLBACK.vocab_size + 2), max_size=40))
def test_bytes_that_are_no_character_leave_all_other_tokens_as_they_are(token_ids: list[int]) -> None:
    ascii_only = "".join(char for char in FALLBACK.decode(token_ids) if char.isascii())
    streamed = "".join(char for char in "".join(texts(FALLBACK, token_ids)) if char.isascii())
    assert "\ufffd" in FALLBACK.decode(token_ids) or streamed == ascii_only


@pytest.mark.parametrize("char", ["ü", "東", "🙂"])
def test_a_character_in_several_tokens_comes_with_its_last_one(char: str) -> None:
    token_ids = [FALLBACK_BYTES + byte for byte in char.encode()]
    assert texts(FALLBACK, [*FALLBACK_THE, *token_ids]) == ["the", *[""] * (len(token_ids) - 1), char, ""]


def test_the_start_of_a_character_that_never_ends_comes_as_a_replacement_character_at_the_end() -> None:
    half = byte_level_ids("🙂")[:1]
    assert texts(BYTES, half) == ["", "\ufffd"]


def test_special_tokens_are_no_text() -> None:
    eos = token_id(_RAW, EOS)
    assert "".join(texts(BYTES, [eos, *byte_level_ids("hello"), eos])) == "hello"


def test_a_special_token_between_words_does_not_eat_the_space_after_it() -> None:
    assert "".join(texts(FALLBACK, [*FALLBACK_THE, 2, 2, *FALLBACK_THE])) == "the the"
