"""The requests of a step as one rank knows them: block tables and token counts, kept from step to step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tandem.engine.step.step_message import Appended, Step, StepRow
from tandem.engine.step.token_counts import TokenCounts
from tandem.errors import EngineFailed
from tandem.models.block_table import BlockTable


@dataclass(slots=True)
class RankRequest:
    """What a rank keeps of a request. `counts`: where penalties need them, on the rank that samples."""

    table: BlockTable
    counts: TokenCounts | None = None


class RankRequests:
    """Mirrors what the leader has sent: every step must be taken, once and in order.

    Args:
        samples: this rank chooses tokens, and so counts them.
    """

    def __init__(self, device: torch.device, *, samples: bool) -> None:
        self._device = device
        self._samples = samples
        self._requests: dict[str, RankRequest] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __getitem__(self, request_id: str) -> RankRequest:
        return self._requests[request_id]

    def take(self, step: Step) -> None:
        """Bring tables and counts up to date. Raises EngineFailed if this rank lacks what the leader has sent."""
        for request_id in step.forgotten:
            self._requests.pop(request_id, None)
        for row in step.rows:
            self._take_blocks(row)
            if self._samples and row.history is not None and row.sample is not None:
                self._take_history(row, row.history, row.sample.position - row.sample.output_len)

    def _take_blocks(self, row: StepRow) -> None:
        known = self._requests.get(row.request_id)
        if row.blocks.first == 0:
            table = BlockTable(row.blocks.items, self._device)
            if known is None:
                self._requests[row.request_id] = RankRequest(table)
            else:
                known.table = table
            return
        _check(row, "blocks", row.blocks, None if known is None else len(known.table))
        self._requests[row.request_id].table.extend(row.blocks.items)

    def _take_history(self, row: StepRow, history: Appended, prompt_len: int) -> None:
        known = self._requests[row.request_id]
        if history.first == 0:
            known.counts = TokenCounts(history.items, prompt_len)
            return
        _check(row, "tokens", history, None if known.counts is None else len(known.counts))
        if known.counts is not None:
            known.counts.extend(history.items)


def _check(row: StepRow, what: str, appended: Appended, known: int | None) -> None:
    if known != appended.first:
        raise EngineFailed(
            f"this rank has {known or 'no'} {what} of request {row.request_id}, the leader has sent {appended.first}"
        )
