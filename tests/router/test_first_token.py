"""The output of a request in order, of one author, whatever the order in which its parts come."""

from __future__ import annotations

from itertools import permutations

import pytest

from tandem.errors import Diverged
from tandem.ids import output_digest
from tandem.router.first_token import OutputMerger
from tandem.wire.messages import Tokens


def tokens(index: int, *token_ids: int, after: list[int]) -> Tokens:
    """Tokens that go on from `after`, as their engine knows it."""
    assert len(after) == index
    return Tokens("r", index, list(token_ids), digest=output_digest(after))


def merged(*messages: Tokens, resumed: tuple[int, ...] = ()) -> list[int]:
    merger = OutputMerger(started=0.0)
    if resumed:
        merger.add(tokens(0, *resumed, after=[]))
    for message in messages:
        merger.add(message)
    return merger.tokens


ONE_TEXT = (
    tokens(0, 10, after=[]),
    tokens(0, 10, after=[]),
    tokens(1, 11, 12, after=[10]),
    tokens(3, 13, after=[10, 11, 12]),
)


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_one_text_is_put_in_order_from_any_order(order: tuple[int, ...]) -> None:
    assert merged(*(ONE_TEXT[place] for place in order)) == [10, 11, 12, 13]


TWO_TEXTS = (tokens(0, 10, after=[]), tokens(0, 20, after=[]), tokens(1, 21, after=[20]))
"""Token 0 of the prefill engine; and what a decode engine has made that lost the KV."""


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_two_texts_are_never_mixed(order: tuple[int, ...]) -> None:
    merger = OutputMerger(started=0.0)

    def add_all() -> None:
        for place in order:
            merger.add(TWO_TEXTS[place])

    with pytest.raises(Diverged):
        add_all()
    assert merger.tokens in ([10], [20], [20, 21])


def test_a_continuation_of_another_text_is_told_by_its_digest_alone() -> None:
    with pytest.raises(Diverged, match="token 1 of the output goes on from another text"):
        merged(TWO_TEXTS[0], TWO_TEXTS[2])


def test_a_second_version_of_a_token_is_named_with_both() -> None:
    with pytest.raises(Diverged, match="token 0 of the output is 10, and came again as 20"):
        merged(TWO_TEXTS[0], TWO_TEXTS[1])


def test_a_resumed_output_is_gone_on_from_as_the_client_has_it() -> None:
    assert merged(tokens(2, 12, after=[10, 11]), resumed=(10, 11)) == [10, 11, 12]
    with pytest.raises(Diverged):
        merged(tokens(2, 12, after=[10, 99]), resumed=(10, 11))


def test_an_end_without_tokens_is_of_any_text() -> None:
    assert merged(ONE_TEXT[0], Tokens("r", 0, [], done=True)) == [10]


def test_what_waits_is_a_gap_until_it_is_forgotten() -> None:
    merger = OutputMerger(started=0.0)
    merger.add(tokens(1, 21, after=[20]))
    assert merger.has_gap
    merger.forget_early()
    assert not merger.has_gap
    merger.add(tokens(0, 10, after=[]))
    assert merger.tokens == [10]
