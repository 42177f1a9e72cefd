"""The model: the next token is a hash of all tokens before it, so that a wrong or mixed continuation shows for certain.

A KV slot holds a digest of all tokens up to its position. What is read from a slot that somebody else has written, or
that nobody protected, is another digest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tandem.kv.layout import Axis, KvLayout

VOCABULARY = 1000
EOS = frozenset(range(40))
"""One token in 25 ends a request."""
GARBAGE = -1
"""What nobody has written yet."""
TAKEN = -2
"""What a read finds in a block that nobody protects: anything."""
ITEM = 8
"""Bytes of a cell: one number."""

_PRIME = (1 << 61) - 1


def digest_after(digest: int, token: int) -> int:
    return (digest * 1_000_003 + token * 7919 + 12345) % _PRIME


def extend_digests(digests: list[int], tokens: Sequence[int]) -> list[int]:
    """Continue a list of digests until it has one for each token."""
    digest = digests[-1] if digests else 1
    for place in range(len(digests), len(tokens)):
        digest = digest_after(digest, tokens[place])
        digests.append(digest)
    return digests


def next_token(digest: int, salt: int, banned: Sequence[int] = ()) -> int:
    """Return the token that follows. `salt`: engines that differ in it choose differently now and then."""
    token = (digest >> 7) % VOCABULARY
    if salt and (digest >> 20) % 4 == 0:
        token = (token + salt) % VOCABULARY
    while token in banned:
        token = (token + 1) % VOCABULARY
    return token


def contradiction(prompt: Sequence[int], output: Sequence[int], min_tokens: int, salts: Sequence[int]) -> str | None:
    """Return what is wrong with an answer; None if each token is one that some engine chooses after the others."""
    digest = extend_digests([], prompt)[-1]
    for index, token in enumerate(output):
        banned = sorted(EOS) if index < min_tokens else []
        possible = {next_token(digest, salt, banned) for salt in salts}
        if token not in possible:
            return f"token {index} is {token}; after those before it only {sorted(possible)} can come"
        digest = digest_after(digest, token)
    return None


@dataclass(slots=True)
class Memory:
    """The KV memory of one rank, one number in each cell.

    Attributes:
        bases: the cell of token 0 of block 0, for each layer and head that the rank holds.
    """

    layout: KvLayout
    cells: list[int]
    bases: list[int]
    block: int
    token: int

    @classmethod
    def of(cls, layout: KvLayout) -> Memory:
        layer, head = layout.stride(Axis.LAYER) // ITEM, layout.stride(Axis.HEAD) // ITEM
        bases = [y * layer + x * head for y in range(layout.layers.size) for x in range(layout.heads.size)]
        cells = [GARBAGE] * (layout.nbytes // ITEM)
        return cls(layout, cells, bases, layout.stride(Axis.BLOCK) // ITEM, layout.stride(Axis.TOKEN) // ITEM)

    def holds(self, blocks: Sequence[int], start: int, stop: int, digests: Sequence[int]) -> int | None:
        """Return the first place in [start, stop) whose slot does not hold its digest; None if all do."""
        size = self.layout.block_size
        while start < stop:
            end = min(stop, (start // size + 1) * size)
            expected = digests[start:end]
            first = blocks[start // size] * self.block + start % size * self.token
            last = first + (end - start) * self.token
            for base in self.bases:
                if self.cells[base + first : base + last : self.token] != expected:
                    return start
            start = end
        return None

    def write(self, blocks: Sequence[int], start: int, stop: int, digests: Sequence[int]) -> None:
        size = self.layout.block_size
        for place in range(start, stop):
            cell = blocks[place // size] * self.block + place % size * self.token
            for base in self.bases:
                self.cells[base + cell] = digests[place]
