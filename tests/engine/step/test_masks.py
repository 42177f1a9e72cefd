"""Masks beside the step loop: grammars compile before their requests are scheduled, and a mask fails its row alone."""

from __future__ import annotations

import math
import threading
import time
from typing import Any

import pytest
import torch

from tandem.engine.step.masks import Constrained, MaskMaker
from tandem.engine.step.sampler import sample
from tandem.engine.step_commands import AbortRequest, Drain, KvFailed, StartRequest
from tandem.errors import Draining, InvalidRequest, Overloaded, RequestError
from tandem.grammar.compiler import GrammarCompiler
from tandem.scheduling.batch import RowError, SampleAt
from tandem.wire.grammar import Grammar
from tandem.wire.messages import Address, Failed, Generate, Local, PullKv
from tandem.wire.sampling import SamplingParams
from tests.engine.step.test_step_loop import Rig
from tests.grammar.conftest import compiler

__all__ = ["compiler"]
LETTERS = Grammar("regex", "[ab]{2}")
BROKEN = Grammar("regex", "(")


class Slow:
    """A loader that waits to be let go."""

    def __init__(self, made: GrammarCompiler) -> None:
        self.go = threading.Event()
        self._made = made

    def __call__(self) -> GrammarCompiler:
        assert self.go.wait(20)
        return self._made


@pytest.fixture
def slow(compiler: GrammarCompiler) -> Slow:
    return Slow(compiler)


def generate(request_id: str, grammar: Grammar | None, kv: Any = None) -> Generate:
    sampling = SamplingParams(max_tokens=3, ignore_eos=True)
    return Generate(request_id, [1, 2, 3], 3, sampling, 60.0, kv or Local(), grammar=grammar)


def test_a_request_waits_for_its_grammar_and_others_do_not_wait_for_it(slow: Slow) -> None:
    rig = Rig(masks=MaskMaker(slow))
    rig.send(StartRequest(0, generate("held", LETTERS)), StartRequest(0, generate("other", None)))
    assert not isinstance(rig.end_of("other"), Failed)
    assert rig.of("held") == []
    slow.go.set()
    assert not isinstance(rig.end_of("held"), Failed)
    rig.stop()


def test_held_requests_count_among_those_that_wait(slow: Slow) -> None:
    rig = Rig(masks=MaskMaker(slow), max_waiting=2)
    for name in ("first", "second", "third"):
        rig.send(StartRequest(0, generate(name, LETTERS)))
    refused = rig.end_of("third")
    assert isinstance(refused, Failed)
    assert (refused.code, "2 requests are waiting" in refused.message) == (Overloaded.code, True)
    slow.go.set()
    for name in ("first", "second"):
        assert not isinstance(rig.end_of(name), Failed)
    rig.stop()


def test_a_held_request_is_finished_by_an_engine_that_drains_and_a_later_one_is_refused(slow: Slow) -> None:
    rig = Rig(masks=MaskMaker(slow))
    rig.send(StartRequest(0, generate("held", LETTERS)), Drain(time.monotonic() + 3600))
    rig.send(StartRequest(0, generate("later", LETTERS)))
    refused = rig.end_of("later")
    assert isinstance(refused, Failed)
    assert refused.code == Draining.code
    slow.go.set()
    assert not isinstance(rig.end_of("held"), Failed)
    rig.thread.join(20)
    assert rig.reason == ["it was drained"]
    rig.mailbox.close()


def test_what_comes_for_a_request_meanwhile_is_not_lost(slow: Slow) -> None:
    rig = Rig(masks=MaskMaker(slow), policy="fail")
    pull = PullKv("p0", "i0", Address("127.0.0.1", 1), "remote")
    rig.send(StartRequest(0, generate("pull", LETTERS, pull)), KvFailed("pull", "the peer is gone"))
    rig.send(StartRequest(0, generate("gone", LETTERS)), AbortRequest("gone"))
    rig.send(StartRequest(0, generate("pull", LETTERS)), StartRequest(0, generate("broken", BROKEN)))
    twice = rig.end_of("pull")
    assert isinstance(twice, Failed)
    assert "in use" in twice.message
    slow.go.set()
    broken = rig.end_of("broken")
    assert isinstance(broken, Failed)
    assert (broken.code, "cannot be compiled" in broken.message) == (InvalidRequest.code, True)
    rig.until(lambda: len(rig.of("pull")) == 2)
    failed = rig.of("pull")[1]
    assert isinstance(failed, Failed)
    assert "the peer is gone" in failed.message
    assert rig.of("gone") == []
    rig.send(AbortRequest("pull"))
    rig.outbox.outputs.clear()
    rig.stop()


def test_a_mask_that_cannot_be_made_is_its_rows_error(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks, ready = MaskMaker(lambda: compiler), threading.Event()
    masks.prepare(LETTERS, lambda error: ready.set())
    assert ready.wait(20)
    good, bad, lost = (Constrained(name, LETTERS, []) for name in ("good", "bad", "lost"))
    mask = masks._matchers.mask  # type: ignore[union-attr]

    def faulty(request_id: str, grammar: Grammar, output: list[int]) -> bytes:
        if request_id == "lost":
            raise BaseException("a panic")
        return mask(request_id, grammar, compiler.encode("z") if request_id == "bad" else output)

    monkeypatch.setattr(masks._matchers, "mask", faulty)
    masks.begin(7, [good, bad, lost])
    taken = masks.take(7)
    assert isinstance(taken["good"], bytes)
    assert [taken[name].code for name in ("bad", "lost")] == [  # type: ignore[union-attr]
        InvalidRequest.code,
        RequestError.code,
    ]
    assert masks.take(7) == {}
    masks.close()


# --- the sampler -----------------------------------------------------------------------------------------------------


def masked(*tokens: int, stop_ids: list[int] | None = None, temperature: float = 0.0, **fields: Any) -> SampleAt:
    mask = bytearray(2)
    for token in tokens:
        mask[token // 8] |= 1 << token % 8
    params = SamplingParams(temperature=temperature, **fields)
    return SampleAt(params, 5, 1, [], True, stop_ids or [], bytes(mask))


def test_only_allowed_tokens_are_chosen_and_other_rows_do_not_notice() -> None:
    logits = torch.randn(40, 12)
    rows = [masked(3, 9, temperature=float(place % 3), seed=place) for place in range(40)]
    rows[7] = SampleAt(SamplingParams(temperature=0.0), 5, 1)
    rows[8] = SampleAt(
        SamplingParams(temperature=0.0), 5, 1, constrained=True, mask=RowError("invalid_request", "too much")
    )
    tokens = sample(logits, rows)
    assert all(one.token_id in (3, 9) for place, one in enumerate(tokens) if place not in (7, 8))
    assert tokens[7].token_id == int(logits[7].argmax())
    assert tokens[8].error == RowError("invalid_request", "too much")


def test_stop_tokens_are_banned_unless_the_grammar_leaves_nothing_else() -> None:
    logits = torch.zeros(3, 12)
    logits[:, 4] = 5.0
    rows = [masked(4, 6, stop_ids=[4]), masked(4, stop_ids=[4]), masked(2, 4, logit_bias={5: 100.0})]
    assert [one.token_id for one in sample(logits, rows)] == [6, 4, 4]


def test_a_mask_that_allows_nothing_and_one_that_is_short_are_no_tokens() -> None:
    logits = torch.zeros(2, 20)
    nothing, short = sample(logits, [masked(), masked(1)])
    assert nothing.error is not None
    assert nothing.error.code == "no_token_left"
    assert short.token_id == 1
    assert math.isfinite(float(logits.sum())), "the logits were not changed"
