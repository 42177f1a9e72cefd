"""A frontend that sends a request id twice harms neither the first request nor any other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from scripts.make_random_model import RandomModel, write_random_model

from tandem.errors import RequestError
from tandem.ids import new_request_id
from tandem.wire.messages import Generate, Prefill, Tokens
from tandem.wire.sampling import SamplingParams
from tests.support.fleet import Fleet, Shape
from tests.support.reference import greedy

SOURCE, SINK = Shape(), Shape(block_size=32)
PROMPT = [7, 3, 250, 9, 4] * 9


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = RandomModel(
        family="llama", hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=96, vocab=280,
        dtype="float32",
    )  # fmt: skip
    return write_random_model(tmp_path_factory.mktemp("ids") / "random", shape)


@pytest.fixture(scope="module")
def fleet(model: Path) -> Iterator[Fleet]:
    made = Fleet(model, [SOURCE, SINK], "tcp")
    yield made
    made.close()


def test_an_id_whose_kv_is_still_kept_is_refused(fleet: Fleet, model: Path) -> None:
    sampling = SamplingParams(max_tokens=1, temperature=0.0)
    message = Generate(new_request_id(), PROMPT, len(PROMPT), sampling, 60.0, Prefill())
    first, again = fleet.send(SOURCE.name, message), fleet.send(SOURCE.name, message)
    assert isinstance(first, Tokens)
    assert first.token_ids == greedy(model, PROMPT, 1)
    assert isinstance(again, RequestError)
    assert "is in use" in str(again)
    output, last = fleet.answer(SOURCE.name, SINK.name, PROMPT[::-1], 4)
    assert output == greedy(model, PROMPT[::-1], 4)
    assert last.details is not None
    assert last.details.disaggregated
