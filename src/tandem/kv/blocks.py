"""The pool of KV blocks and its prefix cache.

A block is in exactly one state:

    free         nobody holds it and its content is worthless
    cached       nobody holds it, but its content is known by digest: findable, and evicted when room is needed,
                 least recently used first
    in use       held by requests, one reference each; findable too if its content is published
    leased       in use by leases only: another engine may be reading it
    quarantined  nobody wants it, but a read into it has not ended: not available until `unquarantine`

The prefix cache finds whole blocks by a chain of digests: a block's digest covers its tokens and the digest of the
block before it, so equal digests mean equal tokens from the start of the request.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

_DIGEST_BYTES = 32


class PrefixChain:
    """Digests of the full blocks of a token list that may grow; each is computed once, when it is first wanted.

    Args:
        salt: chains of different salts have no digest in common; "" is a salt of its own.
    """

    __slots__ = ("_block_size", "_digests", "_root", "_tokens")

    def __init__(self, tokens: list[int], block_size: int, salt: str = "") -> None:
        self._tokens = tokens
        self._root = blake2b(salt.encode(), digest_size=_DIGEST_BYTES).digest() if salt else b""
        self._block_size = block_size
        self._digests: list[bytes] = []

    def digest(self, index: int) -> bytes:
        """Return the digest of block `index`, which must be full. Tokens are below 2**31."""
        digests, size = self._digests, self._block_size
        while len(digests) <= index:
            start = len(digests) * size
            tokens = array("i", self._tokens[start : start + size])
            if len(tokens) < size:
                raise IndexError(f"block {len(digests)} is not full: {len(self._tokens)} tokens, blocks of {size}")
            parent = digests[-1] if digests else self._root
            digests.append(blake2b(parent + tokens.tobytes(), digest_size=_DIGEST_BYTES).digest())
        return digests[index]


@dataclass(frozen=True, slots=True)
class BlockUsage:
    """Blocks by state; they add up to `blocks`."""

    blocks: int
    free: int
    cached: int
    in_use: int
    leased: int
    quarantined: int


class BlockPool:
    """All KV blocks of an engine, by id in [0, num_blocks). Every method is O(blocks it names).

    Attributes:
        freed: number of times that a block became available, ever; only grows.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs blocks and tokens in them; got {num_blocks} blocks of {block_size} tokens")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._digest_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._leases: Counter[int] = Counter()  # block -> references that are leases
        self._quarantined: set[int] = set()
        self.freed = 0

    def blocks_for(self, num_tokens: int) -> int:
        """Return the number of blocks that `num_tokens` tokens need."""
        return -(-num_tokens // self.block_size)

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give now."""
        return len(self._free) + len(self._cached)

    def references(self, block: int) -> int:
        """Return the number of holders of the block; a lease counts as one."""
        return self._references[block]

    def leases(self, block: int) -> int:
        """Return how many of the block's references are leases."""
        return self._leases[block]

    def match_prefix(self, chain: PrefixChain, max_tokens: int) -> list[int]:
        """Find the longest run of published blocks that starts the chain, at most `max_tokens` long.

        Takes a reference on each of them.
        """
        found: list[int] = []
        for index in range(max_tokens // self.block_size):
            block = self._block_of.get(chain.digest(index))
            if block is None:
                break
            found.append(block)
        for block in found:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1
        return found

    def is_published(self, digest: bytes) -> bool:
        """Return whether a block with this content can be found."""
        return digest in self._block_of

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks of unknown content, one reference each; None, and no change, if there are fewer."""
        if count > self.available:
            return None
        taken = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in taken:
            self._references[block] = 1
        return taken

    def free(self, blocks: Sequence[int]) -> None:
        """Give back one reference on each. The tail is evicted before the head, as a head serves more requests."""
        for block in reversed(blocks):
            count = self._references[block]
            if count <= 0:
                raise ValueError(f"block {block} is given back but nobody holds it")
            self._references[block] = count - 1
            self.freed += count == 1
            if count == 1 and self._digest_of[block] is None:
                self._free.append(block)
            elif count == 1:
                self._cached[block] = None

    def publish(self, block: int, digest: bytes) -> None:
        """Make a full, computed block findable. If the same content is published already, that block stays the one."""
        if digest not in self._block_of and self._digest_of[block] is None:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def forget(self, blocks: Iterable[int]) -> None:
        """Make blocks unfindable, because their content cannot be trusted. Their holders keep them."""
        for block in blocks:
            self._unpublish(block)
            if block in self._cached:
                del self._cached[block]
                self._free.append(block)

    def lease(self, blocks: Iterable[int]) -> None:
        """Turn one reference on each into a lease."""
        self._leases.update(blocks)

    def unlease(self, blocks: Sequence[int]) -> None:
        """End a lease: its references are given back."""
        for block in blocks:
            if self._leases[block] <= 0:
                raise ValueError(f"block {block} is not leased")
            self._leases[block] -= 1
            if not self._leases[block]:
                del self._leases[block]
        self.free(blocks)

    def quarantine(self, blocks: Iterable[int]) -> None:
        """Give back the only reference on each, but keep it out of the pool: a read may still write into it."""
        for block in blocks:
            if self._references[block] != 1:
                raise ValueError(f"block {block} has {self._references[block]} references; one that is read into has 1")
            self._unpublish(block)
            self._references[block] = 0
            self._quarantined.add(block)

    def unquarantine(self, blocks: Iterable[int]) -> None:
        """Free blocks whose read has ended."""
        for block in blocks:
            self._quarantined.remove(block)
            self._free.append(block)
            self.freed += 1

    def usage(self) -> BlockUsage:
        """Count the blocks in each state."""
        leased = sum(count == self._references[block] for block, count in self._leases.items())
        held = self.num_blocks - self.available - len(self._quarantined)
        return BlockUsage(
            blocks=self.num_blocks,
            free=len(self._free),
            cached=len(self._cached),
            in_use=held - leased,
            leased=leased,
            quarantined=len(self._quarantined),
        )

    def check(self) -> None:
        """Raise AssertionError if the pool contradicts itself. O(num_blocks)."""
        held = [block for block, count in enumerate(self._references) if count]
        everywhere = sorted([*self._free, *self._cached, *self._quarantined, *held])
        assert everywhere == list(range(self.num_blocks)), "a block is in two states or in none"
        assert min(self._references) >= 0, "a block was freed more often than taken"
        assert all(self._digest_of[block] is None for block in self._free), "a free block is findable"
        assert all(self._digest_of[block] is None for block in self._quarantined), "a quarantined block is findable"
        assert all(self._digest_of[block] is not None for block in self._cached), "a cached block cannot be found"
        published = {digest: block for block, digest in enumerate(self._digest_of) if digest is not None}
        assert published == self._block_of, "the prefix cache finds blocks by what they do not hold"
        assert all(0 < count <= self._references[block] for block, count in self._leases.items()), (
            "a block has more leases than references"
        )

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self._unpublish(block)
        return block

    def _unpublish(self, block: int) -> None:
        digest = self._digest_of[block]
        if digest is not None:
            del self._block_of[digest]
            self._digest_of[block] = None
