"""T1: the hooks as vLLM's own scheduler calls them, its block pool and its failure policy; no model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.vllm_live.scheduler_engine import SchedulerEngine, prompts

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "m"
    subprocess.run([sys.executable, str(ROOT / "scripts/make_random_model.py"), "--out", str(folder)], check=True)
    return folder


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 150])
def test_a_prompt_is_handed_over_and_decoded(model: Path, length: int) -> None:
    [tokens] = prompts(1, lambda _: length)
    with SchedulerEngine(model) as prefill, SchedulerEngine(model, tp=2) as decode:
        params = prefill.prefill("p", tokens)
        assert params is not None
        decode.add("d", tokens, params, max_tokens=5)
        decode.wait_for(lambda: "d" in decode.finished)
        assert not decode.wrong
        assert decode.counts["handoffs"] == 1
        decode.wait_idle()
        prefill.wait_idle()


def test_full_and_partial_prefix_hits_on_the_decode_side(model: Path) -> None:
    [tokens] = prompts(1, lambda _: 100)
    with SchedulerEngine(model) as prefill, SchedulerEngine(model) as decode:
        for number, prompt in enumerate((tokens, tokens, [*tokens, 5, 6, 7], tokens[:64])):
            params = prefill.prefill(f"p{number}", prompt)
            assert params is not None
            decode.add(f"d{number}", prompt, params, max_tokens=3)
            decode.wait_for(lambda number=number: f"d{number}" in decode.finished)  # type: ignore[misc]
        assert not decode.wrong
        decode.wait_idle()


@pytest.mark.parametrize(("policy", "reason"), [("recompute", "length"), ("fail", "error")])
def test_kv_that_does_not_come_follows_vllms_policy(model: Path, policy: str, reason: str) -> None:
    [tokens] = prompts(1, lambda _: 70)
    with SchedulerEngine(model, policy=policy) as decode:
        with SchedulerEngine(model) as prefill:
            params = prefill.prefill("p", tokens)
        assert params is not None
        decode.add("d", tokens, params, max_tokens=3)
        decode.wait_for(lambda: "d" in decode.finished)
        assert str(decode.finished["d"].finish_reason) == reason
        assert not decode.wrong
        decode.wait_idle()


def test_a_client_that_goes_while_kv_is_awaited_costs_no_block(model: Path) -> None:
    [tokens] = prompts(1, lambda _: 70)
    with SchedulerEngine(model) as prefill, SchedulerEngine(model) as decode:
        params = prefill.prefill("p", tokens)
        assert params is not None
        decode.add("d", tokens, params)
        decode.step()
        decode.abort("d")
        decode.wait_idle()
        decode.add("next", tokens, None, max_tokens=2)
        decode.wait_for(lambda: "next" in decode.finished)
        assert not decode.wrong


def test_a_client_that_goes_during_prefill_costs_no_block(model: Path) -> None:
    [tokens] = prompts(1, lambda _: 200)
    with SchedulerEngine(model) as prefill:
        prefill.add("p", tokens, {"do_remote_decode": True})
        prefill.step()
        prefill.abort("p")
        prefill.wait_idle()


def test_preemption_on_either_side_does_no_harm(model: Path) -> None:
    """So few blocks in vLLM's pools that decodes preempt each other, beside prompts that are exported and imported."""
    with (
        SchedulerEngine(model, blocks=9, arena_blocks=24) as prefill,
        SchedulerEngine(model, blocks=9, arena_blocks=24) as decode,
    ):
        for number, tokens in enumerate(prompts(6, lambda number: 50 + number)):
            prefill.add(f"local{number}", [*tokens, 1], None, max_tokens=40)
            params = prefill.prefill(f"p{number}", tokens)
            decode.add(f"local{number}", [*tokens, 2], None, max_tokens=40)
            decode.add(f"d{number}", tokens, params, max_tokens=40)
        for engine in (decode, prefill):
            engine.wait_for(lambda engine=engine: len(engine.finished) == 12)  # type: ignore[misc]
            assert not engine.wrong
            engine.wait_idle()
        assert decode.preempted
        assert prefill.preempted
        assert decode.counts["handoffs"] > 0
