"""One line of what the doctor says: what was looked at, what was found, and what to mend."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass


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


def problem(what: str, found: str, advice: str) -> Finding:
    """Something would not work."""
    return Finding(what, Level.PROBLEM, found, advice)


def any_problem(findings: Iterable[Finding]) -> bool:
    return any(finding.level is Level.PROBLEM for finding in findings)
