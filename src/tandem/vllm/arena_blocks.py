"""The arena's blocks as the scheduler side hands them out: the same on every rank, and never while a step uses them."""

from __future__ import annotations

from collections import deque

from tandem.kv.blocks import BlockPool


class ArenaBlocks:
    """Blocks for exports and imports.

    Two engines may read from each other, so an import must not wait for exports, whose room the other engine gives back
    only as its own imports go on: exports never take the last blocks, and an import that fits beside the most that they
    may take never waits for them. Exports do not wait at all.

    Args:
        share: of all blocks that exports may hold, between 0 and 1.
    """

    def __init__(self, blocks: int, block_size: int, share: float) -> None:
        self._pool = BlockPool(blocks, block_size)
        self._exported = 0
        self._max_exported = int(blocks * share)
        self._fenced: deque[tuple[int, list[int], bool]] = deque()
        self._done = 0

    @property
    def block_size(self) -> int:
        return self._pool.block_size

    @property
    def max_import(self) -> int:
        """Blocks that an import may need."""
        return self._pool.num_blocks - self._max_exported

    @property
    def available(self) -> int:
        return self._pool.available

    def blocks_for(self, num_tokens: int) -> int:
        return self._pool.blocks_for(num_tokens)

    def for_export(self, count: int) -> list[int] | None:
        """Take blocks; None if there is no room now."""
        if self._exported + count > self._max_exported:
            return None
        taken = self._pool.allocate(count)
        if taken is not None:
            self._exported += count
        return taken

    def for_import(self, count: int) -> list[int] | None:
        """Take blocks; None if there is no room now."""
        return self._pool.allocate(count)

    def free(self, blocks: list[int], *, after: int = 0, exported: bool = False) -> None:
        """Give blocks back, once step `after` has ended, which may still copy from or to them."""
        self._fenced.append((after, blocks, exported))
        self.step_done(self._done)

    def step_done(self, step: int) -> None:
        """All workers have done this step, and those before it."""
        self._done = max(self._done, step)
        waiting: deque[tuple[int, list[int], bool]] = deque()
        for after, blocks, exported in self._fenced:
            if after > self._done:
                waiting.append((after, blocks, exported))
            else:
                self._pool.free(blocks)
                self._exported -= len(blocks) if exported else 0
        self._fenced = waiting
