"""Tokenizing in bounded pieces of work."""

import asyncio
import threading

import pytest

from tandem.api import prompt_encoder
from tandem.api.http_errors import ContextTooLong
from tandem.api.prompt_encoder import INLINE_CHARS, INLINE_TEXTS, SHORTENING, PromptEncoder
from tandem.api.text_pool import THREADS, TextPool
from tandem.api.tokenizer import Tokenizer
from tandem.errors import Overloaded
from tests.api.conftest import byte_fallback, byte_level, ids


def encode(tokenizer: Tokenizer, texts: list[str], max_model_len: int = 100_000) -> list[list[int]]:
    encoder = PromptEncoder(tokenizer, TextPool(), max_model_len)
    return asyncio.run(encoder.encode(texts, "prompt", add_special_tokens=True))


@pytest.mark.parametrize(
    "texts",
    [
        [],
        ["hello"],
        ["", "hello", ""],
        ["hello world " * INLINE_CHARS],
        ["hello", "the quick brown fox " * 4000, "東京", "x" * 70_000],
        ["hello"] * (INLINE_TEXTS + 1),
        ["the dog"] * 600,
    ],
)
def test_texts_have_the_ids_of_each_alone_and_keep_their_order(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert encode(tokenizer, texts) == [ids(text) for text in texts]


def test_a_text_that_cannot_fit_is_refused_by_its_length(tokenizer: Tokenizer) -> None:
    encoder = PromptEncoder(tokenizer, TextPool(), 10)
    assert encoder.max_chars == 10 * max(map(len, byte_level().get_vocab()))
    encoder.check_length(encoder.max_chars, "prompt")
    with pytest.raises(ContextTooLong, match=f"at most {encoder.max_chars} can fit into this model's 10 tokens"):
        encoder.check_length(encoder.max_chars + 1, "prompt")


def test_where_texts_are_normalized_more_of_them_may_fit() -> None:
    fallback = Tokenizer(byte_fallback())
    assert PromptEncoder(fallback, TextPool(), 10).max_chars == 10 * fallback.longest_token * SHORTENING


def test_a_long_text_with_too_many_tokens_is_given_up_after_the_piece_that_shows_it(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_encoder, "PIECE_CHARS", 1000)
    seen: list[int] = []
    encode_one = Tokenizer.encode

    def counted(self: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
        seen.append(len(text))
        return encode_one(self, text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(Tokenizer, "encode", counted)
    with pytest.raises(ContextTooLong, match="of which the first 4000 are more than the 3000 tokens"):
        encode(tokenizer, ["\x01" * 20_000], 3000)
    assert seen == [1000] * 4


def test_a_long_text_that_fits_is_taken(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_encoder, "PIECE_CHARS", 1000)
    text = "the quick brown fox jumps over the lazy dog " * 100
    assert encode(tokenizer, [text], len(ids(text))) == [ids(text)]


def test_work_that_waits_has_a_limit_and_what_is_cancelled_is_never_done() -> None:
    async def run() -> list[str]:
        pool, go = TextPool(THREADS + 1), threading.Event()
        done: list[str] = []
        blocked = [asyncio.create_task(pool.run(go.wait, 20)) for _ in range(THREADS)]
        waiting = asyncio.create_task(pool.run(done.append, "waited"))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="wait for it"):
            await pool.run(done.append, "refused")
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        last = asyncio.create_task(pool.run(done.append, "after"))
        await asyncio.sleep(0)
        go.set()
        await asyncio.gather(*blocked, last)
        return done

    assert asyncio.run(run()) == ["after"]


def test_of_a_text_whose_end_has_too_few_tokens_no_more_is_looked_at(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_encoder, "MAX_TAIL_CHARS", 1000)
    encoder = PromptEncoder(tokenizer, TextPool(), 10_000)

    def last(text: str, keep: int) -> list[int]:
        [found] = asyncio.run(encoder.encode([text], "prompt", add_special_tokens=False, keep=keep))
        return found

    assert last("a" * 5000, 900) == ids("a" * 900)
    with pytest.raises(ContextTooLong, match="the last 1000 have fewer tokens than the 990"):
        last("a" * 5000, 990)
    assert last("a" * 1000, 990) == ids("a" * 990)
