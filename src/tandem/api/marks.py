"""Marks in a text that comes in pieces. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def held_back(text: str, marks: Sequence[str]) -> int:
    """Return the number of characters at the end of a text that may be the start of one of the marks."""
    longest = max(len(mark) for mark in marks) - 1
    for length in range(min(len(text), longest), 0, -1):
        if any(len(mark) > length and mark.startswith(text[-length:]) for mark in marks):
            return length
    return 0
