"""A request in the scheduler."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from tandem.ids import output_digest
from tandem.kv.blocks import PrefixChain
from tandem.scheduling.batch import Row, SampleAt, ScoreAt
from tandem.scheduling.events import FinishReason
from tandem.wire.grammar import Grammar
from tandem.wire.messages import Local, Prefill, PullKv, RequestStats
from tandem.wire.sampling import SamplingParams


class RequestState(enum.Enum):
    WAITING = "waiting"  # no blocks
    WAITING_FOR_KV = "waiting for KV"  # a PullKv request: has its blocks, which are being filled
    WAITING_FOR_SLOT = "waiting for a running slot"  # a PullKv request that has its KV
    RUNNING = "running"
    FINISHED = "finished"  # blocks go back as soon as no batch with it is in flight


@dataclass(frozen=True, slots=True)
class Shortage:
    """What was found when a request could not be admitted for lack of blocks.

    Attributes:
        hits: blocks of its prefix that were cached.
        spare: other blocks that were available, less those that had become available ever (`BlockPool.freed`).
    """

    hits: int
    spare: int


@dataclass(slots=True, eq=False)
class Request:
    """A request and its progress. Mutable; the scheduler alone changes it.

    Attributes:
        tokens: prompt and output so far; only ever appended to.
        prompt_len: number of those that are the client's prompt.
        digest: of the output so far (`tandem.ids.output_digest`).
        max_len: the request ends when `tokens` is this long.
        stop_tokens: ids that end it.
        grammar: what its output must match.
        order: place in the order of arrival.
        arrived_at, deadline: seconds.
        kv: how its KV comes and goes; a PullKv request that gives up on its peer becomes Local.
        num_computed: tokens [0, num_computed) have their KV in place, or will have when the batches in flight are done.
        block_ids: block table; covers at least `num_computed` tokens. Rows share the list: it grows in place and is
            replaced, never emptied, when the blocks go.
        num_published: full blocks that were offered to the prefix cache.
        num_announced: tokens of a Prefill request that ChunkComputed events have announced.
        num_scored: tokens of the prompt after the first whose log-probabilities are out.
        num_cached: tokens that the prefix cache had when it was admitted last.
        shortage: why it was not admitted the last time; None if it was, or was not tried yet.
        sampling: as every step brings it to the ranks; without `banned_runs`, of which they hear what bans a token now.
        prefilled: a Prefill request whose whole prompt is computed and whose token is sampled.
        inflight: batches in flight that have a row of it.
    """

    request_id: str
    tokens: list[int]
    prompt_len: int
    max_len: int
    sampling: SamplingParams
    banned_runs: list[list[int]]
    stop_tokens: frozenset[int]
    order: int
    arrived_at: float
    deadline: float
    chain: PrefixChain
    kv: Local | Prefill | PullKv
    grammar: Grammar | None = None
    digest: int = 0
    state: RequestState = RequestState.WAITING
    num_computed: int = 0
    block_ids: list[int] = field(default_factory=list)
    num_published: int = 0
    num_announced: int = 0
    num_scored: int = 0
    num_cached: int = 0
    shortage: Shortage | None = None
    prefilled: bool = False
    inflight: int = 0
    admitted_at: float | None = None
    first_token_at: float | None = None
    kv_arrived_at: float | None = None
    prefix_tokens: int = 0
    recomputations: int = 0
    recompute_reason: str | None = None

    @property
    def output_len(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def num_pending(self) -> int:
        """Number of tokens to compute before the next one can be sampled; 0 while that step is in flight."""
        return len(self.tokens) - self.num_computed

    def append(self, token: int) -> None:
        """Add a token to the output."""
        self.tokens.append(token)
        self.digest = output_digest([token], self.digest)

    def row(self, start: int, count: int) -> Row:
        """Return `count` tokens from `start` as a row of a batch; a token is sampled after the last one known."""
        end = start + count
        sample = self._sample_at() if end == len(self.tokens) else None
        history = self.tokens if sample is not None and self.sampling.uses_history else None
        score = self._score_at(start, end)
        return Row(self.request_id, self.tokens[start:end], start, self.block_ids, sample, history, score)

    @property
    def needs_scores(self) -> bool:
        """Whether the prompt must be computed for its log-probabilities, whatever the prefix cache has."""
        return self.sampling.prompt_logprobs is not None and self.num_scored < self.prompt_len - 1

    def _score_at(self, start: int, end: int) -> ScoreAt | None:
        top = self.sampling.prompt_logprobs
        targets = self.tokens[start + 1 : min(end + 1, self.prompt_len)] if self.needs_scores else []
        return ScoreAt(top, targets) if top is not None and targets else None

    def _sample_at(self) -> SampleAt:
        params, output_len = self.sampling, self.output_len
        constrained = self.grammar is not None
        goes_on = output_len < params.min_tokens or (constrained and params.ignore_eos)
        stops = sorted(self.stop_tokens) if goes_on else []
        banned = [] if constrained else stops
        if self.banned_runs:
            banned = banned + _run_ends(self.banned_runs, self.tokens, output_len)
        return SampleAt(params, len(self.tokens), output_len, banned, constrained, stops if constrained else [])

    def finish_reason(self) -> FinishReason | None:
        """Return the reason if the last token, an output token, ends the request.

        What a grammar ends is at its end, however many tokens were to come at least: nothing can follow.
        """
        may_stop = self.output_len > self.sampling.min_tokens or self.grammar is not None
        if may_stop and self.tokens[-1] in self.stop_tokens:
            return "stop"
        return "length" if len(self.tokens) >= self.max_len else None

    def stats(self, now: float) -> RequestStats:
        """Return the times so far. `transfer_time` runs from admission until all KV had arrived."""
        admitted = self.admitted_at if self.admitted_at is not None else now
        first, arrived = self.first_token_at, self.kv_arrived_at
        return RequestStats(
            queue_time=max(0.0, admitted - self.arrived_at),
            prefill_time=max(0.0, first - admitted) if first is not None and arrived is None else 0.0,
            transfer_time=max(0.0, arrived - admitted) if arrived is not None else 0.0,
            prefix_tokens=self.prefix_tokens,
            recomputations=self.recomputations,
            recompute_reason=self.recompute_reason,
        )


def _run_ends(runs: list[list[int]], tokens: list[int], output_len: int) -> list[int]:
    """Return the tokens that would complete a run, all of which is output."""
    ends = []
    for *before, last in runs:
        if len(before) <= output_len and tokens[len(tokens) - len(before) :] == before:
            ends.append(last)
    return ends
