"""`tandem demo`, as a person runs it."""

from __future__ import annotations

from tests.support.deployment import run_tandem


def test_the_demo_answers_everything_right_over_two_engines_and_leaves_nothing_behind() -> None:
    ended = run_tandem("demo")
    assert ended.code == 0, ended.out + ended.err
    assert "12 of 12 answers right, 12 disaggregated" in ended.out
    assert "Walk from" in ended.out
    assert "prefill-0 ready" in ended.err
