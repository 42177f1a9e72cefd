"""One line of the doctor's report: what was looked at, what was found, and what to mend."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tandem.deadlines import call_within
from tandem.errors import TandemError


class Level(enum.Enum):
    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """`advice`: what a person can do about it; None where all is well."""

    what: str
    level: Level
    found: str
    advice: str | None = None


def ok(what: str, found: str) -> Finding:
    return Finding(what, Level.OK, found)


def warning(what: str, found: str, advice: str) -> Finding:
    """Something works less well than it could, or would not work in some set-ups."""
    return Finding(what, Level.WARNING, found, advice)


def warning_if(bad: bool, what: str, found: str, advice: str) -> Finding:
    return warning(what, found, advice) if bad else ok(what, found)


def problem(what: str, found: str, advice: str) -> Finding:
    """Something would not work."""
    return Finding(what, Level.PROBLEM, found, advice)


def any_problem(findings: Iterable[Finding]) -> bool:
    return any(finding.level is Level.PROBLEM for finding in findings)


def run_check(seconds: float, what: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """Return the findings of `check`, or one problem if it breaks or takes longer than `seconds`."""
    try:
        return call_within(seconds, check, f"check {what}")
    except TimeoutError:
        found, advice = f"no answer within {seconds:.0f} s", "something below it hangs: a name service, a driver"
    except TandemError as error:
        found, advice = str(error), "see the text"
    except Exception as error:
        # One odd file of one odd machine must not hide the findings of all other checks.
        found, advice = f"could not be looked at: {type(error).__name__}: {error}", "see the text"
    return [problem(what, found, advice)]
