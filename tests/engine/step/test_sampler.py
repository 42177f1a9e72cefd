"""The sampler against plain references, row by row."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.step.sampler import sample, uniform
from tandem.engine.step.token_counts import TokenCounts
from tandem.scheduling.batch import RowError, SampleAt, Sampled
from tandem.wire.sampling import SamplingParams

VOCABULARY = 32


def at(
    position: int = 7,
    banned_ids: list[int] | None = None,
    **params: Any,
) -> SampleAt:
    return SampleAt(SamplingParams(**params), position, 0, banned_ids or [])


def random_logits(rows: int, seed: int = 0, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def support(logits: list[float], draws: int = 400, **params: Any) -> set[int]:
    """Every token that comes up."""
    rows = [at(position=position, **params) for position in range(draws)]
    return {result.token_id for result in sample(torch.tensor([logits] * draws), rows)}


def reference_probabilities(logits: list[float], params: SamplingParams) -> list[float]:
    """Temperature, min_p, top_k, top_p as one would write them for a single row, most likely tokens first."""
    scaled = [value / params.temperature for value in logits]
    top = max(scaled)
    weights = {token: math.exp(value - top) for token, value in enumerate(scaled)}
    weights = {token: weight for token, weight in weights.items() if weight >= params.min_p}
    ranked = sorted(weights, key=lambda token: (-weights[token], token))
    if params.top_k:
        ranked = ranked[: params.top_k]
    total, before = sum(weights[token] for token in ranked), 0.0
    kept: list[int] = []
    for token in ranked:
        if kept and before >= params.top_p * total:
            break
        kept.append(token)
        before += weights[token]
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(logits))]


def test_greedy_rows_take_the_largest_logit() -> None:
    logits = random_logits(8)
    results = sample(logits, [at(temperature=0.0) for _ in range(8)])
    assert results == [Sampled(token) for token in logits.argmax(dim=-1).tolist()]


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.empty(0, VOCABULARY), []) == []


def test_a_temperature_near_zero_is_greedy() -> None:
    logits = random_logits(1)
    assert sample(logits, [at(temperature=1e-6)])[0].token_id == logits.argmax().item()


def test_the_given_logits_are_not_changed() -> None:
    logits = random_logits(4)
    before = logits.clone()
    everything = at(
        banned_ids=[4], temperature=0.7, min_p=0.01, top_k=9, top_p=0.9, logprobs=3,
        repetition_penalty=1.2, frequency_penalty=0.5, presence_penalty=0.5, logit_bias={5: 2.0},
    )  # fmt: skip
    sample(logits, [everything] * 4, {row: TokenCounts([1, 2, 3], 1) for row in range(4)})
    sample(logits, [at(temperature=1.0)] * 4)
    assert torch.equal(logits, before)


def test_the_number_behind_a_draw_depends_on_seed_and_position_only() -> None:
    assert uniform(1, 2) == uniform(1, 2) == 0.6434025071674214
    numbers = {uniform(seed, position) for seed in range(30) for position in range(30)}
    assert len(numbers) == 900
    assert all(0.0 <= number < 1.0 for number in numbers)
    assert 0.45 < sum(numbers) / 900 < 0.55
    assert 0.0 <= uniform(2**63 - 1, 2**40) < 1.0


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(top_k=3),
        SamplingParams(top_p=0.6),
        SamplingParams(min_p=0.2),
        SamplingParams(temperature=1.7, min_p=0.05, top_k=6, top_p=0.8),
    ],
    ids=lambda params: f"T{params.temperature}_k{params.top_k}_p{params.top_p}_m{params.min_p}",
)
def test_tokens_come_as_often_as_they_should(params: SamplingParams) -> None:
    draws, logits = 20_000, random_logits(1, seed=3, vocabulary=10)[0].tolist()
    rows = [SampleAt(params, position, 0) for position in range(draws)]
    counts = torch.zeros(10)
    for result in sample(torch.tensor([logits] * draws), rows):
        counts[result.token_id] += 1
    expected = torch.tensor(reference_probabilities(logits, params)) * draws
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    chi_squared = ((counts - expected)[possible] ** 2 / expected[possible]).sum().item()
    # 99.9th percentile for 9 degrees of freedom; the draws are fixed by the positions.
    assert chi_squared < 27.9


@settings(max_examples=150, deadline=None)
@given(
    logits=st.lists(st.sampled_from([-4.0, -1.0, 0.0, 0.5, 1.0, 2.5]), min_size=2, max_size=12),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([1e-6, 0.2, 0.45, 0.83, 0.97, 1.0]),
    min_p=st.sampled_from([0.0, 0.04, 0.3, 1.0]),
    position=st.integers(0, 10_000),
)
def test_a_draw_is_where_the_reference_distribution_has_it(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, position: int
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=5)
    (result,) = sample(torch.tensor([logits]), [SampleAt(params, position, 0)])
    probabilities = reference_probabilities(logits, params)
    below = sum(probabilities[: result.token_id])
    number = uniform(5, position)
    assert probabilities[result.token_id] > 0
    assert below - 1e-5 <= number <= below + probabilities[result.token_id] + 1e-5


def test_of_equally_likely_tokens_top_k_keeps_the_first() -> None:
    assert support([1.0] * 6, top_k=2) == {0, 1}
    assert support([1.0, 2.0, 1.0, 1.0], top_k=2) == {0, 1}


def test_of_equally_likely_tokens_top_p_keeps_just_enough() -> None:
    assert support([1.0] * 10, top_p=0.3) == {0, 1, 2}
    assert support([1.0] * 10, top_p=0.31) == {0, 1, 2, 3}


def test_a_tiny_top_p_keeps_one_token() -> None:
    assert support([0.0, 3.0, 3.0, 1.0], top_p=1e-9) == {1}


def test_top_p_looks_at_what_top_k_left() -> None:
    logits = [math.log(weight) for weight in (0.4, 0.3, 0.2, 0.1)]
    assert support(logits, top_p=0.55) == {0, 1}
    assert support(logits, top_k=2, top_p=0.55) == {0}


def test_top_k_beyond_the_vocabulary_keeps_everything() -> None:
    assert support([0.0] * 4, top_k=100) == {0, 1, 2, 3}


def test_min_p_of_one_keeps_the_most_likely_with_its_equals() -> None:
    assert support([2.0, 1.0, 2.0], min_p=1.0) == {0, 2}


def test_top_p_holds_where_it_needs_more_tokens_than_the_first_look() -> None:
    vocabulary = 5000
    logits = torch.zeros(1, vocabulary).repeat(300, 1)
    tokens = [result.token_id for result in sample(logits, [at(position=n, top_p=0.5) for n in range(300)])]
    assert max(tokens) < vocabulary // 2
    assert max(tokens) > 2000


def test_min_tokens_bans_what_would_stop() -> None:
    assert sample(torch.tensor([[5.0, 1.0, 0.0]]), [at(temperature=0.0, banned_ids=[0])])[0].token_id == 1
    assert support([5.0, 1.0, 0.0], banned_ids=[0, 99]) == {1, 2}


def test_a_bias_can_force_and_ban() -> None:
    assert sample(torch.tensor([[9.0, 0.0, -9.0]]), [at(temperature=0.0, logit_bias={2: 100.0})])[0].token_id == 2
    assert support([3.0, 3.0, 2.0], logit_bias={0: -100.0, 1: -100.0}) == {2}


def test_a_bias_outside_of_the_vocabulary_fails_its_row() -> None:
    bad, good = sample(random_logits(2), [at(logit_bias={99: 1.0}), at(temperature=0.0)])
    assert bad.error == RowError("invalid_request", "logit_bias names token 99; the vocabulary has 32 tokens")
    assert good.error is None


def test_only_allowed_tokens_are_chosen_greedily_or_not() -> None:
    logits = torch.tensor([[9.0, 5.0, 1.0, 0.0]])
    assert sample(logits, [at(temperature=0.0, allowed_token_ids=[2, 3, 99])])[0].token_id == 2
    assert support([9.0, 5.0, 1.0, 0.0], allowed_token_ids=[2, 3]) == {2, 3}
    error = sample(logits, [at(allowed_token_ids=[1], banned_ids=[1])])[0].error
    assert error is not None
    assert error.code == "no_token_left"


@settings(max_examples=100, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 7), min_size=1, max_size=12),
    data=st.data(),
    repetition=st.sampled_from([0.5, 1.0, 1.3, 4.0]),
    presence=st.sampled_from([-1.0, 0.0, 1.5]),
    frequency=st.sampled_from([-0.5, 0.0, 0.7]),
)
def test_penalties_equal_a_plain_reference(
    tokens: list[int], data: st.DataObject, repetition: float, presence: float, frequency: float
) -> None:
    prompt_len = data.draw(st.integers(1, len(tokens)))
    known = data.draw(st.integers(prompt_len, len(tokens)))
    logits = random_logits(1, seed=len(tokens), vocabulary=8)
    expected = logits[0].tolist()
    for token in range(8):
        if token in tokens:
            expected[token] *= repetition if expected[token] < 0 else 1 / repetition
        count = tokens[prompt_len:].count(token)
        expected[token] -= frequency * count + (presence if count else 0.0)
    row = at(
        temperature=0.0,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
    )
    counts = TokenCounts(tokens[:known], prompt_len)
    sample(logits, [row], {0: counts})  # what was counted is kept
    counts.extend(tokens[known:])
    chosen = sample(logits, [row], {0: counts})[0].token_id
    assert expected[chosen] == pytest.approx(max(expected), abs=1e-5)


def test_logprobs_are_those_of_the_model_whatever_shapes_the_choice() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    (result,) = sample(logits, [at(temperature=0.0, logprobs=2, logit_bias={0: 100.0})])
    expected = logits.log_softmax(dim=-1)[0].tolist()
    assert result.token_id == 0
    assert result.logprobs is not None
    assert result.logprobs.logprob == pytest.approx(expected[0])
    assert [token for token, _ in result.logprobs.top] == [3, 2]
    assert [value for _, value in result.logprobs.top] == pytest.approx([expected[3], expected[2]])


def test_each_row_gets_as_many_logprobs_as_it_asked_for() -> None:
    wanted = [0, None, 5, 1]
    results = sample(random_logits(4), [at(temperature=0.0, logprobs=count) for count in wanted])
    got = [None if result.logprobs is None else len(result.logprobs.top) for result in results]
    assert got == wanted


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bad_logits_fail_their_row_only(bad: float, temperature: float) -> None:
    logits = random_logits(3)
    rows = [at(temperature=temperature, top_p=0.9, logprobs=2)] * 3
    expected = sample(logits, rows)
    logits[1, 5] = bad
    results = sample(logits, rows)
    assert results[1].error is not None
    assert results[1].logprobs is None
    assert [results[0], results[2]] == [expected[0], expected[2]]


def test_a_row_without_any_token_left_fails() -> None:
    nothing = torch.full((1, 3), -math.inf)
    assert sample(nothing, [at()])[0].error is not None
    (result,) = sample(torch.zeros(1, 3), [at(banned_ids=[0, 1, 2])])
    assert result.error is not None
    assert result.error.code == "no_token_left"


def test_tokens_that_the_model_rules_out_do_not_come() -> None:
    assert support([0.0, -math.inf, 0.0]) == {0, 2}
    assert support([0.0, -math.inf, 0.0], top_p=0.99, top_k=3) == {0, 2}


row_strategy = st.builds(
    at,
    position=st.integers(0, 1000),
    banned_ids=st.sampled_from([[], [4, 5]]),
    seed=st.integers(0, 5),
    temperature=st.sampled_from([0.0, 0.6, 1.0]),
    top_k=st.sampled_from([0, 1, 5]),
    top_p=st.sampled_from([0.4, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
    logprobs=st.sampled_from([None, 0, 3]),
    logit_bias=st.sampled_from([{}, {7: 5.0}]),
)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(row_strategy, min_size=1, max_size=6), seed=st.integers(0, 100))
def test_a_row_alone_gets_what_it_gets_in_company(rows: list[SampleAt], seed: int) -> None:
    logits = random_logits(len(rows), seed=seed)
    counted = [TokenCounts([1, 2, 3, 3], 2) if row.params.uses_history else None for row in rows]
    together = sample(logits, rows, {index: counts for index, counts in enumerate(counted) if counts is not None})
    for index, (row, other, counts) in enumerate(zip(rows, together, counted, strict=True)):
        (alone,) = sample(logits[index : index + 1], [row], {} if counts is None else {0: counts})
        assert alone.token_id == other.token_id
        assert (alone.logprobs is None) == (other.logprobs is None)
        if alone.logprobs is not None and other.logprobs is not None:
            assert alone.logprobs.logprob == pytest.approx(other.logprobs.logprob, abs=1e-5)
