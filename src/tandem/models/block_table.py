"""The block table of one sequence: which blocks hold its keys and values, in its order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class BlockTable:
    """Block ids as a list and, on the model's device, as a tensor; both grow in place.

    What `extend` costs depends on what it adds alone, on average: memory doubles when it is full.

    Attributes:
        ids: all of them.
    """

    def __init__(self, ids: Sequence[int] = (), device: torch.device | str = "cpu") -> None:
        self.ids: list[int] = []
        self._tensor = torch.empty(max(16, len(ids)), dtype=torch.int64, device=device)
        self.extend(ids)

    def __len__(self) -> int:
        return len(self.ids)

    def extend(self, ids: Sequence[int]) -> None:
        """Add blocks at the end."""
        if not ids:
            return
        before, after = len(self.ids), len(self.ids) + len(ids)
        if after > self._tensor.shape[0]:
            grown = self._tensor.new_empty(max(after, 2 * self._tensor.shape[0]))
            grown[:before] = self._tensor[:before]
            self._tensor = grown
        self.ids += ids
        self._tensor[before:after] = torch.tensor(ids, dtype=torch.int64, device=self._tensor.device)

    def first(self, count: int) -> Tensor:
        """Return the first `count` as int64 [count], without a copy."""
        return self._tensor[:count]
