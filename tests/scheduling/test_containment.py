"""A request that fails takes nothing of others with it; what an engine sends says which text it goes on from."""

from __future__ import annotations

from typing import Any

import pytest

from tandem.errors import EngineFailed, InvalidRequest, NoTokenLeft, RequestError
from tandem.ids import output_digest
from tandem.scheduling.events import TokenOut
from tandem.wire.messages import Failed, Local, Prefill
from tandem.wire.sampling import SamplingParams
from tests.scheduling.fake_engine import VOCABULARY, FakeEngine, generate, pull, reference

PROMPT = [1, 2, 3, 4, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1e-39},
        {"temperature": float("nan")},
        {"max_tokens": 2, "min_tokens": 3},
        {"stop_token_ids": [VOCABULARY]},
        {"stop_token_ids": [-1]},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {VOCABULARY: 1.0}},
    ],
    ids=str,
)
def test_a_message_is_checked_whoever_sent_it(params: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        FakeEngine().add(generate("r", PROMPT, **params))


def test_a_token_of_a_prompt_is_within_the_vocabulary() -> None:
    engine = FakeEngine()
    engine.add(generate("ends", [0, VOCABULARY - 1]))
    for token in (-1, VOCABULARY):
        with pytest.raises(InvalidRequest, match=f"token id {token}; this model's vocabulary has 5 tokens"):
            engine.add(generate("r", [token]))


@pytest.mark.parametrize(
    ("error", "cached"),
    [(NoTokenLeft("nothing is left"), 4), (RequestError("a bug"), 4), (EngineFailed("not numbers"), 0)],
    ids=lambda value: getattr(value, "code", None),
)
@pytest.mark.parametrize("kv", [Local(), Prefill()], ids=lambda kv: type(kv).__name__)
def test_only_unusable_logits_wipe_the_prefix_cache(error: RequestError, cached: int, kv: Any) -> None:
    """An error that is the request's own says nothing about the KV that it shares."""
    engine = FakeEngine()
    engine.add(generate("before", PROMPT, max_tokens=1))
    engine.run_until_done()
    engine.broken["bad"] = error
    bad = engine.add(generate("bad", PROMPT, kv, max_tokens=5))
    engine.run_until_done()
    [failed] = bad.terminal
    assert isinstance(failed, Failed)
    assert (failed.code, failed.message) == (error.code, str(error))
    after = engine.add(generate("after", PROMPT, max_tokens=1))
    engine.run_until_done()
    [end] = after.terminal
    assert not isinstance(end, Failed)
    assert end.stats.prefix_tokens == cached
    assert engine.scheduler.totals.requests_failed == 1


@pytest.mark.parametrize("resumed", [0, 2])
def test_each_token_says_which_output_it_goes_on_from(resumed: int) -> None:
    output, _ = reference(PROMPT, len(PROMPT), SamplingParams(max_tokens=6, ignore_eos=True), 64)
    engine = FakeEngine()
    engine.add(generate("r", PROMPT + output[:resumed], prompt_len=len(PROMPT), max_tokens=6))
    engine.run_until_done()
    told = [event for event in engine.events if isinstance(event, TokenOut)]
    assert [event.index for event in told] == list(range(resumed, 6))
    assert [event.digest for event in told] == [output_digest(output[: event.index]) for event in told]


@pytest.mark.parametrize("arrived", [True, False])
def test_a_first_token_that_the_prefill_engine_has_sent_is_gone_on_from(arrived: bool) -> None:
    """Whether its KV comes or is lost: the decode engine does not choose another one."""
    engine = FakeEngine()
    record = engine.add(generate("r", PROMPT, pull(), max_tokens=3))
    engine.step()
    theirs = (engine.first_output("r") + 1) % VOCABULARY
    if arrived:
        engine.scheduler.kv_arrived("r", theirs, engine.now)
        engine.write(engine.reads["r"], [7] * len(PROMPT))
    else:
        engine.scheduler.kv_failed("r", "the peer was lost", engine.now, reading=False, first_token=theirs)
    engine.reads.clear()
    engine.settle()
    engine.run_until_done()
    told = [event for event in engine.events if isinstance(event, TokenOut)]
    assert [event.index for event in told] == [1, 2]
    assert told[0].digest == output_digest([theirs])
    assert told[1].digest == output_digest([theirs, record.outputs[1]])
