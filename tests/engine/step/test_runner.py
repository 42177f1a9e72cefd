"""One rank's part of a step with the demo model: rows that no batch can be made of do not fail the others."""

from __future__ import annotations

from importlib import resources

import pytest
import torch

from tandem.engine.step.runner import KvMemory, Runner
from tandem.engine.step.step_message import StepEncoder
from tandem.engine.world import SoloWorld
from tandem.models.collectives import SoloCollectives
from tandem.models.kv_cache import kv_layout
from tandem.models.loader import load_decoder
from tandem.models.rank_position import RankPosition
from tandem.scheduling.batch import Batch, Row, SampleAt
from tandem.wire.sampling import SamplingParams

GREEDY = SampleAt(SamplingParams(temperature=0.0), 3, 0)
GOOD, OTHER = Row("good", [1, 2, 3], 0, [0], GREEDY), Row("other", [4, 5], 0, [1], GREEDY)
BAD = [Row("bad", [], 0, [2], GREEDY), Row("bad", [1] * 17, 0, [2], GREEDY)]


@pytest.fixture
def runner() -> Runner:
    with resources.as_file(resources.files("tandem") / "demo_model") as path:
        decoder = load_decoder(str(path), RankPosition(), SoloCollectives(), torch.float32, torch.device("cpu"))
    layout = kv_layout(decoder.config, RankPosition(), 4, 16, torch.float32)
    return Runner(decoder, KvMemory(layout, torch.float32, torch.device("cpu")), SoloWorld())


@pytest.mark.parametrize("bad", BAD, ids=["no tokens", "too few blocks"])
def test_a_row_that_is_none_fails_alone(bad: Row, runner: Runner) -> None:
    steps = StepEncoder(4)
    alone = runner.run(steps.step(Batch(0, [GOOD, OTHER])))
    mixed = runner.run(steps.step(Batch(1, [bad, GOOD, bad, OTHER])))
    assert alone is not None
    assert mixed is not None
    assert [mixed.sampled[1], mixed.sampled[3]] == alone.sampled
    for place in (0, 2):
        failed = mixed.sampled[place]
        assert failed is not None
        assert failed.error is not None
        assert "a row needs tokens and a block for each" in failed.error.message


def test_a_batch_of_such_rows_alone_computes_nothing(runner: Runner) -> None:
    result = runner.run(StepEncoder(4).step(Batch(0, BAD)))
    assert result is not None
    assert all(sampled is not None and sampled.error is not None for sampled in result.sampled)
