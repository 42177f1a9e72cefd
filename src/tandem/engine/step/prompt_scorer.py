"""Log-probabilities of a prompt's own tokens, from the hidden states of the step that computes them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tandem.engine.step.step_message import StepRow
from tandem.models.decoder import Decoder
from tandem.wire.messages import TokenLogprobs

PIECE = 128
"""Positions whose logits are there at once: 128 of a vocabulary of 152,000 take 78 MB."""


def score_prompts(
    decoder: Decoder, rows: list[StepRow], hidden: Tensor, last_tokens: Tensor
) -> dict[int, list[TokenLogprobs] | None]:
    """Return for each row that asks for it the log-probabilities of its `targets`, or None if they are no numbers.

    All tensor-parallel ranks of the last stage must call it; those other than 0 get nothing.

    Args:
        hidden: [N, hidden_size].
        last_tokens: int64 [rows], the index in N of each row's last token; its other tokens are right before it.
    """
    wanted = [(index, row) for index, row in enumerate(rows) if row.score is not None]
    if not wanted:
        return {}
    lasts: list[int] = last_tokens.tolist()
    found: dict[int, list[TokenLogprobs] | None] = {}
    for index, row in wanted:
        assert row.score is not None
        targets, scores = row.score.targets, []
        first = lasts[index] - len(row.tokens) + 1
        for begin in range(0, len(targets), PIECE):
            piece = targets[begin : begin + PIECE]
            places = torch.arange(first + begin, first + begin + len(piece), device=hidden.device)
            logits = decoder.logits(hidden, places)
            if logits is not None:
                scores += _score(logits, piece, row.score.top)
        if len(scores) == len(targets):
            found[index] = None if any(math.isnan(one.logprob) for one in scores) else scores
    return found


def _score(logits: Tensor, targets: list[int], top: int) -> list[TokenLogprobs]:
    """Score one target for each row of logits [n, vocabulary]."""
    values = logits.log_softmax(dim=-1)
    tokens = torch.tensor(targets, device=logits.device).unsqueeze(-1)
    own = values.gather(-1, tokens)
    ranks = (values > own).sum(dim=-1).add_(1).tolist()
    best = values.topk(min(top, values.shape[-1]), dim=-1)
    ids, best_values = best.indices.tolist(), best.values.tolist()
    return [
        TokenLogprobs(logprob, list(zip(ids[index], best_values[index], strict=True)), ranks[index])
        for index, logprob in enumerate(own.squeeze(-1).tolist())
    ]
