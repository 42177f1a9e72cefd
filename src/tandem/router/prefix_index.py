"""Which engines hold the KV of which prefixes, as far as this router sent them there. Pure.

Nothing is asked of the engines: what an engine was sent it caches, and what it caches it drops in the order of last use
once its KV memory is full. So a bounded list for each engine, in that order, is a good guess, and a wrong one costs a
prompt's computation, never an answer.
"""

from __future__ import annotations

from array import array
from bisect import bisect
from collections import OrderedDict
from collections.abc import Collection, Sequence
from functools import partial

CHUNK_TOKENS = 64
"""Prefixes are compared at every so many tokens: a handful of lookups for a prompt, a few thousand for a long one."""

PrefixKeys = list[int]
"""A text's prefixes, the shortest first, each by a hash of all tokens in it."""


def prefix_keys(token_ids: Sequence[int], salt: object = None) -> PrefixKeys:
    """Return the keys of a text's prefixes of 1, 2, ... whole chunks; texts of different salts have none in common.

    Python's own hash of bytes is keyed anew in each process, so nobody can make prompts that collide.
    """
    data, step = array("q", token_ids).tobytes(), 8 * CHUNK_TOKENS
    keys: PrefixKeys = []
    key = hash((salt,))
    for start in range(0, len(data) - step + 1, step):
        key = hash((key, data[start : start + step]))
        keys.append(key)
    return keys


class PrefixIndex:
    """Prefixes by engine, in the order of last use.

    An engine that holds a prefix holds the shorter ones too: they are used whenever it is, and dropped after it.
    """

    def __init__(self) -> None:
        self._held: dict[str, OrderedDict[int, None]] = {}

    def add(self, holder: str, keys: PrefixKeys, capacity: int) -> None:
        """Note that an engine has, or will soon have, the KV of a text.

        Args:
            holder: incarnation of the engine.
            capacity: tokens that its KV memory has room for.
        """
        held = self._held.setdefault(holder, OrderedDict())
        for key in reversed(keys):
            held[key] = None
            held.move_to_end(key)
        while len(held) > capacity // CHUNK_TOKENS:
            held.popitem(last=False)

    def keep_only(self, holders: Collection[str]) -> None:
        """Forget all other engines: their memory is gone."""
        for holder in self._held.keys() - set(holders):
            del self._held[holder]

    def matches(self, keys: PrefixKeys) -> dict[str, int]:
        """Return the tokens, from the start of a text, that each engine has KV of; engines without any are left out."""
        found: dict[str, int] = {}
        for holder, held in self._held.items():
            if keys and keys[0] in held:
                found[holder] = bisect(keys, False, key=partial(_is_missing, held)) * CHUNK_TOKENS
        return found

    def __contains__(self, holder: str) -> bool:
        """Return whether anything is noted of an engine."""
        return holder in self._held

    def __len__(self) -> int:
        """Return the number of prefixes held, over all engines."""
        return sum(len(held) for held in self._held.values())


def _is_missing(held: Collection[int], key: int) -> bool:
    return key not in held
