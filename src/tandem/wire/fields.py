"""Types of fields that messages have in common, each bounded."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

MAX_TEXT = 4096
Text = Annotated[str, Meta(max_length=MAX_TEXT)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Count = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]


def clip(text: str) -> str:
    """Shorten a text of any length to fit a `Text` field."""
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 4]} ..."
