"""Refuse JSON that would make too much of little, by looking at its structure alone."""

from __future__ import annotations

import re

from tandem.errors import InvalidRequest

MAX_DEPTH = 32
MAX_VALUES = 100_000
"""Strings, objects and lists, each begin and end counted: a message has about ten."""
MAX_NUMBERS = 2**22
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[][{}"]', re.DOTALL)


def check_structure(body: bytes | bytearray, max_list: int) -> None:
    """Look at strings and brackets, until there are too many: 32 MB of `[],[],...` take seconds and 1 GB to decode.

    Args:
        max_list: numbers that a list may have.

    Raises InvalidRequest.
    """
    depth = numbers = end = 0
    for values, match in enumerate(_TOKEN.finditer(body), 1):
        start = match.start()
        commas = body.count(b",", end, start)
        end = match.end()
        mark = body[start]
        if mark == 0x22 and end - start == 1:
            raise InvalidRequest("the body is not JSON: a string does not end")
        depth += (mark in b"[{") - (mark in b"]}")
        numbers += commas
        if depth > MAX_DEPTH:
            raise InvalidRequest(f"the body is nested more than {MAX_DEPTH} levels deep")
        if commas > max_list:
            raise InvalidRequest(f"a list in the body has more than {max_list} numbers, which no prompt may have")
        if values > MAX_VALUES or numbers > MAX_NUMBERS:
            raise InvalidRequest(f"the body has more than {MAX_VALUES} strings and brackets or {MAX_NUMBERS} numbers")
