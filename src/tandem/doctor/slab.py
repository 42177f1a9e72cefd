"""Memory that nodes read from each other, with a pattern by which the reader can tell that the bytes are right."""

from __future__ import annotations

import torch

from tandem.transfer.transports.base import Region


class Slab:
    """Two halves of `half` bytes (a multiple of 8): the first is read by others, the second is read into.

    The k-th 64-bit word of the first half of rank r is r * 2^40 + k + 1.
    """

    def __init__(self, half: int, rank: int, device: torch.device) -> None:
        self.half = half
        self.device = device
        self._words = torch.zeros(2 * half // 8, dtype=torch.int64, device=device)
        self._words[: half // 8] = self._expected(rank, half)

    @property
    def region(self) -> Region:
        device = -1 if self.device.type == "cpu" else (self.device.index or 0)
        return Region(self._words.data_ptr(), 2 * self.half, device)

    def forget(self) -> None:
        """Empty the second half, so that nothing of an earlier read is taken for a later one's."""
        self._words[self.half // 8 :] = 0

    def holds(self, rank: int, length: int) -> bool:
        """Whether the second half starts with `length` bytes of that rank's first half."""
        start = self.half // 8
        return torch.equal(self._words[start : start + length // 8], self._expected(rank, length))

    def _expected(self, rank: int, length: int) -> torch.Tensor:
        first = (rank << 40) + 1
        return torch.arange(first, first + length // 8, dtype=torch.int64, device=self.device)
