"""Findings, and checks that break."""

from __future__ import annotations

import threading

from tandem.doctor.findings import Finding, Level, any_problem, ok, problem, run_check, warning
from tandem.errors import ConfigError


def test_only_problems_count_as_problems() -> None:
    assert not any_problem([ok("a", "x"), warning("b", "y", "do")])
    assert any_problem([ok("a", "x"), problem("b", "y", "do")])


def test_a_check_that_hangs_is_a_problem_and_not_a_hang() -> None:
    never = threading.Event()
    [finding] = run_check(0.05, "names", lambda: [ok("x", "y")] if never.wait() else [])
    assert finding.level is Level.PROBLEM
    assert "names" in finding.what


def test_a_check_that_breaks_is_a_problem_that_says_how() -> None:
    [finding] = run_check(5, "odd file", lambda: [ok("x", str(1 // 0))])
    assert finding.level is Level.PROBLEM
    assert "ZeroDivisionError" in finding.found


def test_an_error_of_ours_is_a_problem_in_its_own_words() -> None:
    def check() -> list[Finding]:
        raise ConfigError("no such key")

    [finding] = run_check(5, "key", check)
    assert (finding.level, finding.found) == (Level.PROBLEM, "no such key")
