"""A step as every rank of the engine gets it: of block tables and histories only what is new since the rank's last one.

Block tables and token lists only ever grow, or are replaced as a whole. So the leader keeps, for each request, which
list it sent last and how much of it, and a rank keeps what it has got. Messages arrive in order and none is lost, or
the connection breaks and the engine ends; a rank compares what it has with what the leader thinks it has all the same.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import msgspec

from tandem.scheduling.batch import Batch, Mask, Row, SampleAt, ScoreAt


class Appended(msgspec.Struct, frozen=True, array_like=True):
    """What a list has from place `first` on; 0: it is another list than before, or new."""

    first: int
    items: list[int]


class StepRow(msgspec.Struct, frozen=True, array_like=True):
    """A row of a batch.

    Attributes:
        blocks: of its block table.
        history: of all tokens of the request, where penalties need them.
    """

    request_id: str
    tokens: list[int]
    start: int
    blocks: Appended
    sample: SampleAt | None = None
    history: Appended | None = None
    score: ScoreAt | None = None


class Step(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """A batch for the ranks.

    Attributes:
        forgotten: requests of which ranks keep nothing any more; done before `rows`.
    """

    batch_id: int
    rows: list[StepRow]
    forgotten: list[str] = []


class Masks(msgspec.Struct, frozen=True, array_like=True, tag="masks"):
    """The masks of a batch's constrained rows by request, for the rank that samples, where that is not the leader."""

    batch_id: int
    masks: dict[str, Mask]


@dataclass(slots=True)
class _Sent:
    """A list and how many of its items the ranks have. It is the same as long as it is this object."""

    items: list[int]
    count: int = 0


class StepEncoder:
    """Turns batches into steps, in the order in which the ranks get them.

    Args:
        kept_requests: number of requests of which ranks keep tables: the least recently used go. One that comes back
            is sent as a whole again, so this bounds memory and nothing depends on when a request ends.
    """

    def __init__(self, kept_requests: int) -> None:
        self._kept_requests = kept_requests
        self._blocks: OrderedDict[str, _Sent] = OrderedDict()  # least recently used first
        self._histories: dict[str, _Sent] = {}

    def step(self, batch: Batch) -> Step:
        """Return the step for a batch. It must reach every rank."""
        rows = [self._row(row) for row in batch.rows]
        return Step(batch.batch_id, rows, self._forget(len(batch.rows)))

    def _row(self, row: Row) -> StepRow:
        sent = self._blocks.get(row.request_id)
        if sent is None or sent.items is not row.block_ids:
            sent = self._blocks[row.request_id] = _Sent(row.block_ids)
        self._blocks.move_to_end(row.request_id)
        history = None
        if row.history is not None:
            told = self._histories.get(row.request_id)
            if told is None or told.items is not row.history:
                told = self._histories[row.request_id] = _Sent(row.history)
            history = _appended(told)
        return StepRow(row.request_id, row.tokens, row.start, _appended(sent), row.sample, history, row.score)

    def _forget(self, in_use: int) -> list[str]:
        forgotten = []
        while len(self._blocks) > max(self._kept_requests, in_use):
            request_id, _ = self._blocks.popitem(last=False)
            self._histories.pop(request_id, None)
            forgotten.append(request_id)
        return forgotten


def _appended(sent: _Sent) -> Appended:
    first, sent.count = sent.count, len(sent.items)
    return Appended(first, sent.items[first:])
