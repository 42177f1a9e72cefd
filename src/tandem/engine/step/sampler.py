"""Chooses tokens from logits.

Order, as in vLLM: tokens that are not allowed, stop tokens before `min_tokens` and the last tokens of banned runs are
ruled out; `logit_bias`; repetition, then frequency and presence penalties; tokens that the request's grammar does not
allow are ruled out; then greedy rows take the largest logit, while the others are divided by their temperature,
filtered by `min_p`, `top_k` and `top_p`, and drawn from. Reported log-probabilities are those of the logits as the
model gave them.

A draw inverts the cumulative distribution at one number made from the request's seed and the token's position alone:
no state, no device's generator. So a request gets the same tokens however it is batched, preempted or resumed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from hashlib import blake2b

import torch
from torch import Tensor

from tandem.engine.step.token_counts import TokenCounts
from tandem.errors import EngineFailed, InvalidRequest, NoTokenLeft, RequestError, request_error
from tandem.scheduling.batch import RowError, SampleAt, Sampled, row_failed
from tandem.wire.messages import TokenLogprobs
from tandem.wire.sampling import SamplingParams

log = logging.getLogger(__name__)

_GREEDY = 1e-5  # temperatures below count as 0
_CANDIDATES = 128  # top_p mostly ends within this number of most likely tokens
_RUN = 128  # tokens
_GREEDY_ROW = SampleAt(SamplingParams(temperature=0.0), 0, 0)
_NOTHING: Mapping[int, TokenCounts] = {}


def sample(logits: Tensor, rows: list[SampleAt], counted: Mapping[int, TokenCounts] = _NOTHING) -> list[Sampled]:
    """Choose one token for each row.

    Args:
        logits: [rows, vocabulary], float32, any device; not changed. -inf is fine, NaN and +inf are not.
        rows: the sampling of each token.
        counted: the tokens so far, by row, of those whose parameters have penalties.

    Returns:
        One `Sampled` per row; a row that cannot be sampled has an `error`, and the others do not notice.

    Raises what a plain greedy row raises too: then it is not for any row's sake.
    """
    if not rows:
        return []
    try:
        return _sample_together(logits, rows, counted)
    except Exception as error:
        log.warning("a batch of %d rows cannot be sampled together (%s); each row by itself", len(rows), error)
    _sample_together(logits[:1], [_GREEDY_ROW], _NOTHING)
    return [_sample_alone(logits[index : index + 1], at, counted.get(index)) for index, at in enumerate(rows)]


def _sample_alone(logits: Tensor, at: SampleAt, counts: TokenCounts | None) -> Sampled:
    """Choose the token of one row [1, vocabulary]; what is raised for it is its own."""
    try:
        return _sample_together(logits, [at], _NOTHING if counts is None else {0: counts})[0]
    except Exception as error:
        log.exception("token %d of a request cannot be sampled", at.position)
        return row_failed(RequestError(f"the next token could not be sampled: {type(error).__name__}"))


def _sample_together(logits: Tensor, rows: list[SampleAt], counted: Mapping[int, TokenCounts]) -> list[Sampled]:
    peaks, greedy = logits.max(dim=-1)
    chosen: list[int] = greedy.tolist()
    # A row's largest logit is NaN if any is, inf if any is, and -inf only if all are.
    errors: dict[int, RequestError] = {
        row: EngineFailed(f"the model's logits are not numbers (the largest is {peak})")
        for row, peak in enumerate(peaks.tolist())
        if not math.isfinite(peak)
    }
    for row, at in enumerate(rows):
        if isinstance(at.mask, RowError):
            errors.setdefault(row, request_error(at.mask.code, at.mask.message))
    adjusted = [row for row, at in enumerate(rows) if row not in errors and not (_is_greedy(at) and row not in counted)]
    if adjusted:
        tokens, failures = _choose(
            logits[adjusted], [rows[row] for row in adjusted], [counted.get(row) for row in adjusted]
        )
        for row, token in zip(adjusted, tokens, strict=True):
            chosen[row] = token
        errors |= {adjusted[index]: error for index, error in failures.items()}
    wanted = {row: at.params.logprobs for row, at in enumerate(rows) if at.params.logprobs is not None}
    logprobs = _logprobs(logits, chosen, {row: top for row, top in wanted.items() if row not in errors})
    return [
        row_failed(errors[row]) if row in errors else Sampled(token, logprobs.get(row))
        for row, token in enumerate(chosen)
    ]


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1) with 53 random bits that depend only on the arguments (both in [0, 2**64))."""
    digest = blake2b(seed.to_bytes(8, "little") + position.to_bytes(8, "little"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _is_greedy(at: SampleAt) -> bool:
    params = at.params
    return params.temperature < _GREEDY and not at.banned_ids and not params.adjusts_logits and at.mask is None


def _choose(
    logits: Tensor, rows: list[SampleAt], counted: list[TokenCounts | None]
) -> tuple[list[int], dict[int, RequestError]]:
    """Return tokens for rows with finite peaks, and errors of rows that have none. Writes over the logits."""
    errors: dict[int, RequestError] = {}
    for row, (at, counts) in enumerate(zip(rows, counted, strict=True)):
        if (error := _adjust(logits[row], at, counts)) is not None:
            errors[row] = error
    peaks, largest = logits.max(dim=-1)
    chosen: list[int] = largest.tolist()
    for row, peak in enumerate(peaks.tolist()):
        if not math.isfinite(peak):
            text = "the parameters of the request rule out every token of the vocabulary; ask for less"
            errors.setdefault(row, NoTokenLeft(text))
    drawn = [row for row, at in enumerate(rows) if at.params.temperature >= _GREEDY and row not in errors]
    if drawn:
        whole = len(drawn) == len(rows)
        scores = (logits if whole else logits[drawn]).sub_((peaks if whole else peaks[drawn]).unsqueeze(-1))
        for row, token in zip(drawn, _draw(scores, [rows[row] for row in drawn]), strict=True):
            chosen[row] = token
    return chosen, errors


# --- before the temperature ----------------------------------------------------------------------------------------


def _adjust(logits: Tensor, at: SampleAt, counts: TokenCounts | None) -> InvalidRequest | None:
    """Ban, bias and penalise tokens of one row [vocabulary] in place. Returns an error if that cannot be done."""
    params, vocabulary = at.params, logits.shape[-1]
    if params.allowed_token_ids is not None:
        allowed = [token for token in params.allowed_token_ids if token < vocabulary]
        kept = logits[allowed]
        logits.fill_(-math.inf)
        logits[allowed] = kept
    banned = [token for token in at.banned_ids if token < vocabulary]
    if banned:
        logits[banned] = -math.inf
    if params.logit_bias:
        unknown = max(params.logit_bias)
        if unknown >= vocabulary:
            text = f"logit_bias names token {unknown}; the vocabulary has {vocabulary} tokens"
            return InvalidRequest(text, param="logit_bias")
        logits[list(params.logit_bias)] += logits.new_tensor(list(params.logit_bias.values()))
    if counts is not None:
        _penalise(logits, params, counts)
    if isinstance(at.mask, bytes):
        logits.masked_fill_(~_allowed(at.mask, at.stop_ids, logits), -math.inf)
    return None


def _allowed(mask: bytes, stop_ids: list[int], logits: Tensor) -> Tensor:
    """Return which tokens [vocabulary] a mask allows, less the stop tokens unless it allows nothing else."""
    bits = torch.frombuffer(bytearray(mask), dtype=torch.uint8).to(logits.device)
    spread = (bits.unsqueeze(-1) >> torch.arange(8, device=logits.device)) & 1
    allowed = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    count = min(spread.numel(), len(allowed))
    allowed[:count] = spread.flatten()[:count].bool()
    if stop_ids:
        others = allowed.clone()
        others[[token for token in stop_ids if token < len(allowed)]] = False
        return others if bool(others.any()) else allowed
    return allowed


def _penalise(logits: Tensor, params: SamplingParams, tokens: TokenCounts) -> None:
    """Apply penalties: repetition to prompt and output (Keskar et al. 2019, CTRL), others to the output (OpenAI)."""
    seen, counts = tokens.occurrences(logits)
    if params.repetition_penalty != 1.0:
        factor = torch.where(logits > 0, 1.0 / params.repetition_penalty, params.repetition_penalty)
        logits *= factor.where(seen, 1.0)
    if params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
        logits -= counts * params.frequency_penalty + (counts > 0) * params.presence_penalty


# --- after it ------------------------------------------------------------------------------------------------------


def _draw(scores: Tensor, rows: list[SampleAt]) -> list[int]:
    """Draw one token per row; `scores` [rows, vocabulary] are logits less the row's largest and are written over."""
    params = [at.params for at in rows]
    scores /= scores.new_tensor([p.temperature for p in params]).unsqueeze(-1)
    if any(p.min_p > 0.0 for p in params):
        floor = scores.new_tensor([math.log(p.min_p) if p.min_p > 0.0 else -math.inf for p in params])
        scores.masked_fill_(scores < floor.unsqueeze(-1), -math.inf)
    filtered = [row for row, p in enumerate(params) if p.top_p < 1.0 or 0 < p.top_k < scores.shape[-1]]
    if len(filtered) == len(rows):
        scores = _keep_most_likely(scores, params)
    elif filtered:
        scores[filtered] = _keep_most_likely(scores[filtered], [params[row] for row in filtered])
    return _invert(scores.exp(), [uniform(at.params.seed, at.position) for at in rows])


def _invert(weights: Tensor, numbers: list[float]) -> list[int]:
    """Return where each row's cumulative weights [rows, vocabulary] first exceed a share (in [0, 1)) of their total.

    In two steps, first to a run of tokens and then within it: a running sum over the whole vocabulary in double
    precision is what is slow, and single precision would favour the tokens with the larger ids.
    """
    missing = -weights.shape[-1] % _RUN
    runs = torch.nn.functional.pad(weights, (0, missing)).reshape(len(numbers), -1, _RUN)  # [rows, runs, tokens]
    cumulative = runs.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    targets = cumulative[:, -1:] * cumulative.new_tensor(numbers).unsqueeze(-1)
    run = _first_above(cumulative, targets)
    targets -= torch.where(run > 0, cumulative.gather(-1, (run - 1).clamp(min=0)), 0.0)
    within = runs.gather(1, run.unsqueeze(-1).expand(-1, -1, _RUN)).squeeze(1).cumsum(dim=-1, dtype=torch.float64)
    tokens: list[int] = (run * _RUN + _first_above(within, targets)).squeeze(-1).tolist()
    return tokens


def _first_above(cumulative: Tensor, targets: Tensor) -> Tensor:
    """Return where running sums [rows, n] first exceed targets [rows, 1]; they always grow at that index."""
    # Rounding may lift a target to the total, which nothing exceeds; the number just below it is somebody's.
    below_total = torch.nextafter(cumulative[:, -1:], torch.zeros_like(targets))
    return torch.searchsorted(cumulative, torch.minimum(targets, below_total).clamp(min=0.0), right=True)


def _keep_most_likely(scores: Tensor, params: list[SamplingParams], width: int = _CANDIDATES) -> Tensor:
    """Apply `top_k`, then `top_p` to what that left; of equally likely tokens those with the smaller ids are kept.

    Args:
        width: number of the most likely tokens to look at; more, if that proves to be too few.
    """
    vocabulary = scores.shape[-1]
    at_most = torch.tensor([min(p.top_k or vocabulary, vocabulary) for p in params], device=scores.device)
    width = min(vocabulary, max([width, *(p.top_k for p in params if p.top_k < vocabulary)]))
    ranked = scores.topk(width).values if width < vocabulary else scores.sort(dim=-1, descending=True).values
    count, enough = _nucleus(scores, ranked, at_most, params)
    # Tokens that equal the last one to be kept are kept until there are enough.
    threshold = ranked.gather(-1, count.unsqueeze(-1) - 1)
    above, equal = scores > threshold, scores == threshold
    spare = count.unsqueeze(-1) - above.sum(dim=-1, keepdim=True)
    kept = scores.masked_fill(~(above | (equal & (equal.cumsum(dim=-1) <= spare))), -math.inf)
    again = [row for row, is_enough in enumerate(enough.tolist()) if not is_enough]
    if again:
        kept[again] = _keep_most_likely(scores[again], [params[row] for row in again], width * 16)
    return kept


def _nucleus(scores: Tensor, ranked: Tensor, at_most: Tensor, params: list[SamplingParams]) -> tuple[Tensor, Tensor]:
    """Count each row's most likely tokens that `top_k` and `top_p` keep (Holtzman et al. 2019).

    Args:
        ranked: [rows, width], the largest scores, largest first; `width` is at least every `top_k`.
        at_most: [rows], what `top_k` allows.

    Returns:
        Counts in [1, width], and whether `width` was enough to tell; [rows] each.
    """
    width, vocabulary = ranked.shape[-1], scores.shape[-1]
    rank = torch.arange(width, device=scores.device)
    mass = ranked.exp().double().masked_fill(rank >= at_most.unsqueeze(-1), 0.0)
    cumulative = mass.cumsum(dim=-1)
    total = torch.where(at_most < vocabulary, cumulative[:, -1], scores.exp().sum(dim=-1, dtype=torch.float64))
    # A token is kept as long as those before it do not reach top_p; the first one always is.
    target = total * total.new_tensor([p.top_p for p in params])
    inside = ((cumulative - mass) < target.unsqueeze(-1)).sum(dim=-1).clamp(min=1)
    limited = torch.tensor([p.top_p < 1.0 for p in params], device=scores.device)
    count = torch.where(limited, torch.minimum(inside, at_most), at_most).clamp(max=width)
    return count, (inside < width) | (at_most <= width)


# --- log-probabilities ---------------------------------------------------------------------------------------------


def _logprobs(logits: Tensor, chosen: list[int], wanted: dict[int, int]) -> dict[int, TokenLogprobs]:
    """Return log-probabilities by row for the rows in `wanted`, with that number of most likely tokens each."""
    if not wanted:
        return {}
    rows = list(wanted)
    values = logits[rows].log_softmax(dim=-1)
    tokens = torch.tensor([chosen[row] for row in rows], device=logits.device)
    own = values.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).tolist()
    best = values.topk(min(max(wanted.values()), values.shape[-1]), dim=-1)
    ids, best_values = best.indices.tolist(), best.values.tolist()
    return {
        row: TokenLogprobs(own[index], list(zip(ids[index], best_values[index], strict=True))[: wanted[row]])
        for index, row in enumerate(rows)
    }
