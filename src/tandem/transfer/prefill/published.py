"""Published KV that nobody has claimed: the share of the pool that it may hold, and the order in which it gives way."""

from __future__ import annotations

from collections import Counter


class UnclaimedKv:
    """Published prompts that wait for their first claim, oldest first. Pure; time is passed in.

    Args:
        limit: blocks that they may hold together; a block that several of them share counts once.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._prompts: dict[str, tuple[float, list[int]]] = {}
        self._holders: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def blocks(self) -> int:
        """Blocks that they hold together."""
        return len(self._holders)

    def add(self, request_id: str, blocks: list[int], now: float) -> None:
        """A prompt was computed at `now`, the latest of all."""
        self._prompts[request_id] = now, blocks
        self._holders.update(blocks)

    def remove(self, request_id: str) -> None:
        """It was claimed, or has ended. Unknown ids are fine."""
        _, blocks = self._prompts.pop(request_id, (0.0, []))
        for block in blocks:
            self._holders[block] -= 1
            if not self._holders[block]:
                del self._holders[block]

    def excess(self) -> str | None:
        """Return which of them must give way, if they hold too much together: the oldest."""
        return next(iter(self._prompts)) if self.blocks > self._limit else None

    def older_than(self, seconds: float, now: float) -> list[str]:
        """Return those that wait for longer."""
        return [request_id for request_id, (since, _) in self._prompts.items() if now - since >= seconds]
