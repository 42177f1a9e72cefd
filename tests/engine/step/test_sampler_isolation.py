"""What one row asks for can fail that row alone; what fails every row is the engine's failure."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tandem.engine.step import sampler
from tandem.engine.step.sampler import sample
from tandem.engine.step.token_counts import TokenCounts
from tandem.scheduling.batch import RowError, SampleAt
from tandem.wire.sampling import SamplingParams
from tests.engine.step.test_sampler import at, random_logits
from tests.wire.test_sampling import INSIDE, shown

VOCABULARY = 32
GOOD = at(temperature=0.7, seed=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30], ids=str)
@pytest.mark.parametrize("params", INSIDE, ids=shown)
def test_every_parameter_within_its_range_gives_a_token(
    params: dict[str, Any], scale: float, dtype: torch.dtype
) -> None:
    """With logits as large and as small as can be, as a model of this dtype makes them."""
    within = {name: value for name, value in params.items() if name not in ("logit_bias", "stop_token_ids")}
    logits = (random_logits(3) * scale).to(dtype).float()
    logits[:, 5:9] = -math.inf
    bias = {token: value for token, value in params.get("logit_bias", {}).items() if token < VOCABULARY}
    stops = [token for token in params.get("stop_token_ids", []) if token < VOCABULARY - 1]
    row = SampleAt(SamplingParams(**within, logit_bias=bias), 7, 0, stops)
    alone = sample(logits[1:2], [GOOD])
    counted = {index: TokenCounts([1, 2, 3, 4], 2) for index in (0, 2)}
    results = sample(logits, [row, GOOD, row], counted)
    assert [result.error for result in results] == [None] * 3
    assert all(0 <= result.token_id < VOCABULARY for result in results)
    assert results[1] == alone[0]


def test_a_fault_in_one_row_is_found_and_fails_that_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    adjust = sampler._adjust

    def faulty(logits: torch.Tensor, row: SampleAt, counts: TokenCounts | None) -> Any:
        if row.params.seed == 13:
            raise RuntimeError("value cannot be converted to type float without overflow")
        return adjust(logits, row, counts)

    rows = [GOOD, at(seed=13), at(temperature=0.0), at(seed=4, logprobs=2)]
    logits = random_logits(4)
    expected = sample(logits, rows)
    monkeypatch.setattr(sampler, "_adjust", faulty)
    results = sample(logits, rows)
    assert results[1].error == RowError("internal_error", "the next token could not be sampled: RuntimeError")
    assert [results[0], *results[2:]] == [expected[0], *expected[2:]]


def test_a_row_with_a_fault_fails_alone_also_where_it_is_alone() -> None:
    """The parameter that ended a whole engine, past all checks."""
    penalty = at(repetition_penalty=1e-39)
    [result] = sample(random_logits(1), [penalty], {0: TokenCounts([1, 2], 1)})
    assert result.error is not None
    assert result.error.code == "internal_error"


def test_what_fails_a_plain_row_too_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(sampler, "_sample_together", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        sample(random_logits(2), [GOOD, GOOD])
