"""The batch that the scheduler hands to the engine's ranks, and its result."""

from __future__ import annotations

import msgspec

from tandem.errors import RequestError
from tandem.wire.messages import TokenLogprobs
from tandem.wire.sampling import SamplingParams


class RowError(msgspec.Struct, frozen=True, array_like=True):
    """What leaves one row without a token; the others do not notice.

    Attributes:
        code: of a class in tandem.errors. `engine_failed`: not the request is at fault but what was computed for it.
        message: for people.
    """

    code: str
    message: str


class SampleAt(msgspec.Struct, frozen=True, array_like=True):
    """Choose a token after the row's last one.

    Attributes:
        position: index of the new token in the whole request (prompt and output); keys the random generator.
        output_len: output tokens before it, for `min_tokens`.
        banned_ids: tokens that may not be chosen here.
        constrained: only tokens that the request's grammar allows may be chosen.
        stop_ids: with a grammar, tokens that may not be chosen here unless it leaves nothing else.
        mask: what the grammar allows, one bit a token, lowest bit first, or why it could not be made; set on the rank
            that samples, as it is made while the model runs.
    """

    params: SamplingParams
    position: int
    output_len: int
    banned_ids: list[int] = []
    constrained: bool = False
    stop_ids: list[int] = []
    mask: bytes | RowError | None = None


class ScoreAt(msgspec.Struct, frozen=True, array_like=True):
    """Tell how likely the prompt's `targets` were, each after one of the row's tokens, and the `top` most likely."""

    top: int
    targets: list[int]


class Row(msgspec.Struct, frozen=True):
    """One request's part of a step: compute `tokens` at positions [start, start + len(tokens)).

    Attributes:
        block_ids: the block table; it covers at least start + len(tokens) positions. The request's own list, not to be
            changed: it grows in place, and is another object once it holds other blocks.
        history: all tokens of the request, where penalties need them; the request's own list too.
    """

    request_id: str
    tokens: list[int]
    start: int
    block_ids: list[int]
    sample: SampleAt | None = None
    history: list[int] | None = None
    score: ScoreAt | None = None


class Batch(msgspec.Struct, frozen=True):
    batch_id: int
    rows: list[Row]


class Sampled(msgspec.Struct, frozen=True, array_like=True):
    """A chosen token, and its `logprobs` if asked for; or the `error` that left this one row without a token."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: RowError | None = None


Mask = bytes | RowError
"""The tokens that may follow a row, as in `SampleAt.mask`."""


def row_failed(error: RequestError) -> Sampled:
    """Return the result of a row that has no token."""
    return Sampled(-1, None, RowError(error.code, str(error)))


class StepResult(msgspec.Struct, frozen=True, array_like=True, tag="result"):
    """One entry per row of the batch: None where nothing was to be sampled, and all went well.

    `scores`: by row, for those that ask for them.
    """

    batch_id: int
    sampled: list[Sampled | None]
    scores: dict[int, list[TokenLogprobs]] = {}
