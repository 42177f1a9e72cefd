"""T3 to T5: real servers. The first start of a server takes a minute or two."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import reference
from tests.vllm_live.servers import Server, Servers, hand_off

ROOT = Path(__file__).parents[2]
LENGTHS = (1, 31, 32, 33, 150, 600)


def prompt(length: int, seed: int) -> list[int]:
    return [(7 * index + 31 * seed + length) % 290 + 3 for index in range(length)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "m"
    subprocess.run([sys.executable, str(ROOT / "scripts/make_random_model.py"), "--out", str(folder)], check=True)
    return folder


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Servers]:
    servers = Servers(tmp_path_factory.mktemp("servers"), model)
    yield servers
    servers.stop()


@pytest.fixture(scope="module")
def pair(servers: Servers) -> tuple[Server, Server]:
    """A prefill and a decode engine of vLLM, with blocks of different sizes."""
    prefill, decode = servers.vllm("prefill", "0"), servers.vllm("decode", "1", block_size=64)
    prefill.wait_ready()
    decode.wait_ready()
    return prefill, decode


def greedy(model: Path, tokens: list[int]) -> list[int]:
    return reference.greedy(model, tokens, 12)


def text_of(model: Path, token_ids: list[int]) -> str:
    from transformers import AutoTokenizer

    return str(AutoTokenizer.from_pretrained(model).decode(token_ids, skip_special_tokens=True))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("length", LENGTHS)
def test_two_vllm_servers_answer_as_transformers_does(pair: tuple[Server, Server], model: Path, length: int) -> None:
    prefill, decode = pair
    before = decode.metric("vllm:tandem_handoffs_total")
    tokens = prompt(length, seed=1)
    answer = hand_off(prefill, decode, tokens, return_token_ids=True)
    assert answer["choices"][0]["token_ids"] == greedy(model, tokens)
    assert decode.metric("vllm:tandem_handoffs_total") == before + 1
    assert decode.metric("vllm:tandem_failures_total") == 0


def test_a_prefix_that_the_decode_side_has_is_not_read_again(pair: tuple[Server, Server], model: Path) -> None:
    """Blocks of 64 there: a full hit on the first 128 tokens, then a longer prompt that begins with them."""
    prefill, decode = pair
    tokens = prompt(150, seed=2)
    hand_off(prefill, decode, tokens)
    before = decode.metric("vllm:tandem_bytes_total")
    longer = tokens + prompt(20, seed=3)
    answer = hand_off(prefill, decode, longer, return_token_ids=True)
    assert answer["choices"][0]["token_ids"] == greedy(model, longer)
    read = decode.metric("vllm:tandem_bytes_total") - before
    assert read == (len(longer) - 128) * 4 * 2 * 2 * 32 * 4  # layers, K and V, heads, dim, bytes


def test_a_proxy_that_knows_nothing_of_tandem_serves_a_chat(pair: tuple[Server, Server], servers: Servers) -> None:
    prefill, decode = pair
    proxy = servers.proxy("proxy", prefill, decode)
    proxy.wait_ready()
    before = decode.metric("vllm:tandem_handoffs_total")
    said = [{"role": "user", "content": "What is a tandem?"}]
    answer = proxy.chat(said)["choices"][0]["message"]["content"]
    assert answer == prefill.chat(said)["choices"][0]["message"]["content"]
    assert decode.metric("vllm:tandem_handoffs_total") == before + 1


def test_many_at_once(pair: tuple[Server, Server], model: Path) -> None:
    prefill, decode = pair
    prompts = [prompt(40 + 13 * number, seed=10 + number) for number in range(12)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda tokens: hand_off(prefill, decode, tokens, return_token_ids=True), prompts))
    for tokens, answer in zip(prompts, answers, strict=True):
        assert answer["choices"][0]["token_ids"] == greedy(model, tokens)


@pytest.mark.timeout(600)
def test_tandem_and_vllm_hand_off_to_each_other(pair: tuple[Server, Server], servers: Servers, model: Path) -> None:
    vllm, _ = pair
    tandem = servers.tandem("tandem")
    tandem.wait_ready()
    for length in LENGTHS:
        tokens = prompt(length, seed=4)
        expected = greedy(model, tokens)
        answer = hand_off(vllm, tandem, tokens)
        assert answer["tandem"]["disaggregated"], answer["tandem"]
        assert answer["tandem"]["recomputations"] == 0
        assert answer["choices"][0]["text"] == text_of(model, expected)
        tokens = prompt(length, seed=5)
        before = vllm.metric("vllm:tandem_handoffs_total")
        answer = hand_off(tandem, vllm, tokens, return_token_ids=True)
        assert answer["choices"][0]["token_ids"] == greedy(model, tokens)
        assert vllm.metric("vllm:tandem_handoffs_total") == before + 1


@pytest.mark.timeout(600)
def test_an_engine_that_stands_still_is_given_up_and_used_again(
    pair: tuple[Server, Server], servers: Servers, model: Path
) -> None:
    """SIGSTOP between prefill and decode, for longer than a lease."""
    _, decode = pair
    tandem = servers.tandem("stopped")
    tandem.wait_ready()
    hand_off(tandem, decode, prompt(40, seed=7))
    tokens = prompt(150, seed=7)
    first = tandem.complete(tokens, max_tokens=1, kv_transfer_params={"do_remote_decode": True})
    with tandem.standing_still():
        answer = decode.complete(tokens, kv_transfer_params=first["kv_transfer_params"], return_token_ids=True)
    assert answer["choices"][0]["token_ids"] == greedy(model, tokens)
    before = decode.metric("vllm:tandem_handoffs_total")
    for seed in range(50):  # until the session is tried again
        hand_off(tandem, decode, prompt(70, seed=100 + seed))
        if decode.metric("vllm:tandem_handoffs_total") > before:
            return
        time.sleep(0.2)
    raise AssertionError("the engine was not used again")


def test_kv_of_another_engine_that_is_gone_is_computed_here(
    pair: tuple[Server, Server], servers: Servers, model: Path
) -> None:
    """kill -9 between prefill and decode; the decode engine goes on."""
    _, decode = pair
    tandem = servers.tandem("killed")
    tandem.wait_ready()
    tokens = prompt(150, seed=6)
    first = tandem.complete(tokens, max_tokens=1, kv_transfer_params={"do_remote_decode": True})
    tandem.process.kill()
    tandem.process.wait()
    before = decode.metric("vllm:tandem_failures_total")
    answer = decode.complete(tokens, kv_transfer_params=first["kv_transfer_params"], return_token_ids=True)
    assert answer["choices"][0]["token_ids"] == greedy(model, tokens)
    assert decode.metric("vllm:tandem_failures_total") == before + 1
