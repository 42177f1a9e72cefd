"""The grammar of a structured answer, as it travels with a request."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

MAX_GRAMMAR = 131_072
"""Characters. The largest schemas of public APIs have some ten thousand; compiling takes time by the length."""


class Grammar(msgspec.Struct, frozen=True, array_like=True):
    """What the text of an answer must match, from its first token to its end.

    Attributes:
        kind: of `source`: a JSON schema, a regular expression, or a grammar, in llguidance's dialect of Lark or
            in GBNF.
    """

    kind: Literal["json_schema", "regex", "lark"]
    source: Annotated[str, Meta(min_length=1, max_length=MAX_GRAMMAR)]
