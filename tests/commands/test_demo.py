"""What the demo asks and how it judges the answers."""

from __future__ import annotations

from tandem.client import TimedCompletion
from tandem.commands.demo import Result, sample
from tandem.demo_questions import Question
from tests.commands.serving_details import serving_details

QUESTION = Question("reverse", "Reverse: ab", "ba")


def completion(text: str, disaggregated: bool = True, reason: str | None = None) -> TimedCompletion:
    return TimedCompletion(0.0, 1.0, text, details=serving_details(disaggregated, reason))


def test_a_third_of_the_questions_has_a_long_prompt_and_half_is_asked_at_once() -> None:
    first, second = sample(12)
    assert (len(first), len(second)) == (6, 6)
    assert [len(question.prompt) > 350 for question in first] == [False, False, True] * 2
    assert [len(question.prompt) > 350 for question in second] == [False, False, True] * 2


def test_one_question_is_asked_alone() -> None:
    first, second = sample(1)
    assert (len(first), len(second)) == (1, 0)


def test_a_right_answer_over_two_engines_has_no_complaint() -> None:
    assert Result(QUESTION, completion("ba")).complaint is None


def test_a_wrong_answer_is_shown_with_the_right_one() -> None:
    complaint = Result(QUESTION, completion("bb")).complaint
    assert complaint is not None
    assert "'ba'" in complaint
    assert "'bb'" in complaint


def test_a_right_answer_of_one_engine_is_a_complaint_with_the_reason() -> None:
    complaint = Result(QUESTION, completion("ba", disaggregated=False, reason="KV was lost")).complaint
    assert complaint is not None
    assert "KV was lost" in complaint


def test_no_answer_is_a_complaint_with_the_error() -> None:
    complaint = Result(QUESTION, error="the engine is gone").complaint
    assert complaint is not None
    assert "the engine is gone" in complaint
