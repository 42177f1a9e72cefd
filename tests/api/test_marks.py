"""The end of a piece of text that may be the start of a mark."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.api.marks import held_back

texts = st.text("<a>", max_size=6)


@pytest.mark.parametrize(
    ("text", "marks", "length"),
    [
        ("", ["<a>"], 0),
        ("so", ["<a>"], 0),
        ("so <", ["<a>"], 1),
        ("so <a", ["<a>"], 2),
        ("so <a>", ["<a>"], 0),
        ("<<", ["<<a>"], 2),
        ("so <b", ["<a>", "<bc>"], 2),
        ("so", ["o"], 0),
    ],
)
def test_the_longest_start_of_a_mark_is_held_back(text: str, marks: list[str], length: int) -> None:
    assert held_back(text, marks) == length


@given(texts, st.lists(texts.filter(bool), min_size=1, max_size=3), texts)
def test_a_mark_that_ends_with_what_comes_next_begins_in_what_is_held_back(
    text: str, marks: list[str], more: str
) -> None:
    kept = len(text) - held_back(text, marks)
    for mark in marks:
        start = (text + more).find(mark)
        while start >= 0:
            assert start >= kept or start + len(mark) <= len(text), "what went out has no unfinished mark"
            start = (text + more).find(mark, start + 1)
