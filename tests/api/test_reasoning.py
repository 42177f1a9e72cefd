"""Reasoning is told from the answer, in whatever pieces the text comes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.api.reasoning import ReasoningSplitter, reasons

# the prompt opens the reasoning, text, reasoning, content
CASES = [
    (False, "<think>\nTwo and two.\n</think>\n\nFour.", "Two and two.\n", "Four."),
    (False, "\n<think>a < b</think>b", "a < b", "b"),
    (False, "<think>\n\n</think>\n\nFour.", "\n", "Four."),
    (False, "Four.", "", "Four."),
    (False, "I <think> so</think>", "", "I <think> so</think>"),
    (False, "<thin", "", "<thin"),
    (False, "", "", ""),
    (True, "Two and two.\n</think>\n\nFour.</think>", "Two and two.\n", "Four.</think>"),
    (True, "<think>\nit repeats the mark</think>ok", "it repeats the mark", "ok"),
    (True, "cut at the length </thi", "cut at the length </thi", ""),
    (True, "nothing else</think>\n", "nothing else", ""),
]


def read(inside: bool, pieces: list[str]) -> tuple[str, str]:
    splitter = ReasoningSplitter(inside)
    parts = [*(splitter.push(piece) for piece in pieces), splitter.finish()]
    return "".join(one for one, _ in parts), "".join(one for _, one in parts)


@pytest.mark.parametrize(("inside", "text", "reasoning", "content"), CASES)
def test_reasoning_is_told_from_content(inside: bool, text: str, reasoning: str, content: str) -> None:
    assert read(inside, [text]) == (reasoning, content)
    assert read(inside, list(text)) == (reasoning, content)


@given(st.data())
def test_the_pieces_in_which_a_text_comes_do_not_matter(data: st.DataObject) -> None:
    inside, text, reasoning, content = data.draw(st.sampled_from(CASES))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(inside, pieces) == (reasoning, content)


@pytest.mark.parametrize(
    ("name", "template", "found"),
    [("auto", "{{ '<think>' }}{{ '</think>' }}", True), ("auto", "{{ messages }}", False), ("auto", None, False),
     ("none", "</think>", False), ("think", None, True)],
)  # fmt: skip
def test_the_template_shows_whether_a_model_reasons(name: str, template: str | None, found: bool) -> None:
    assert reasons(name, template) is found
