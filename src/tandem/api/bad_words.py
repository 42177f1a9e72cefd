"""`bad_words` as runs of tokens that must not be generated."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.api.loaded_model import LoadedModel
from tandem.errors import InvalidRequest


async def banned_runs(words: Sequence[str] | None, model: LoadedModel) -> list[list[int]]:
    """Return each word's tokens, as it stands at the start of a text and, where that differs, after a space (as vLLM).

    Raises InvalidRequest for a word without tokens.
    """
    if not words:
        return []
    bare = [word.lstrip() for word in words]
    encoded = await model.encoder.encode([*bare, *(f" {word}" for word in bare)], "bad_words", add_special_tokens=False)
    runs: list[list[int]] = []
    for place, (first, spaced) in enumerate(zip(encoded[: len(bare)], encoded[len(bare) :], strict=True)):
        if not first:
            raise InvalidRequest(f"bad_words[{place}] is {words[place]!r}, which has no tokens", param="bad_words")
        runs.append(first)
        # Where the space is a token of its own, the word's own tokens follow it and are banned already.
        if len(spaced) == len(first) and spaced[0] != first[0]:
            runs.append(spaced)
    return runs
