"""What happens to requests and arena blocks when a hand-off does not go as planned."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
import time
from typing import Any

import pytest

from tandem.errors import TransferError
from tandem.transfer.decode.dialer import PeerDialer
from tandem.vllm.pages import VEC
from tandem.vllm.scheduler import NewRequest, Scheduled
from tests.vllm.engine import Engine, true_kv
from tests.vllm.test_handoff import arena_block, prompt

BLOCKS = [4, 5, 6, 7]


def test_the_kv_of_another_prompt_is_not_taken() -> None:
    with Engine(VEC) as prefill, Engine(VEC) as decode:
        params = prefill.prefill("p", prompt(70), [0, 1, 2], chunk=70)
        assert params is not None
        decode.claim_fails("d", prompt(70, seed=1), params, BLOCKS)
        decode.wait_idle()


def test_an_engine_that_is_gone_fails_the_request_and_not_the_engine() -> None:
    tokens = prompt(70)
    with Engine(VEC) as decode:
        with Engine(VEC, lease_ttl=1.0) as prefill:
            params = prefill.prefill("p", tokens, [0, 1, 2], chunk=70)
            assert params is not None
        decode.claim_fails("d", tokens, params, BLOCKS)
        decode.wait_idle()


def test_an_engine_that_restarts_under_its_id_and_port_is_another_one() -> None:
    old, new = prompt(70), prompt(70, seed=1)
    with Engine(VEC) as decode:
        with Engine(VEC, engine_id="same") as prefill:
            port = prefill.port
            first, kept = (prefill.prefill(name, old, [0, 1, 2], chunk=70) for name in ("first", "kept"))
            assert first is not None
            assert kept is not None
            decode.claim("first", old, first, BLOCKS)
            decode.wait_for(lambda: "first" in decode.received)
        with Engine(VEC, engine_id="same", port=port) as again:
            fresh = again.prefill("kept", new, [0, 1, 2], chunk=70)
            assert fresh is not None
            assert fresh["remote_engine_id"] == kept["remote_engine_id"]
            decode.claim("new", new, fresh, [8, 9, 10])
            decode.claim_fails("old", old, kept, BLOCKS)
            decode.wait_for(lambda: "new" in decode.received)
            assert "new" not in decode.failed
            assert decode.holds(new, [8, 9, 10])
        decode.wait_idle()


@pytest.mark.parametrize(("recompute", "wanted"), [(True, 0), (False, 70)])
def test_params_that_lead_nowhere_follow_the_failure_policy(recompute: bool, wanted: int) -> None:
    with Engine(VEC, recompute=recompute) as decode:
        asked = {"do_remote_prefill": True, "remote_host": "10.1.2.3", "remote_engine_id": "x", "remote_port": 1}
        assert decode.claim("d", prompt(70), asked, BLOCKS) == wanted
        if wanted:  # vLLM itself fails it once it hears
            decode.wait_for(lambda: "d" in decode.failed)
        decode.wait_idle()


def test_a_prompt_with_more_than_tokens_is_not_offered() -> None:
    with Engine(VEC) as engine:
        engine.side.on_new_request(NewRequest("p", prompt(40), {"do_remote_decode": True}, "a LoRA adapter"))
        assert not engine.side.is_export("p")
        assert engine.side.finished("p", aborted=False) is None


def test_without_room_in_the_arena_there_is_no_offer_and_the_next_one_succeeds() -> None:
    with Engine(VEC, arena_blocks=4, lease_ttl=1.0) as prefill, Engine(VEC) as decode:  # exports may hold 2
        assert prefill.prefill("large", prompt(65), [0, 1, 2], chunk=32) is None
        assert prefill.prefill("first", prompt(64), [0, 1], chunk=32) is not None
        assert prefill.prefill("second", prompt(33, seed=1), [0, 1], chunk=32) is None
        prefill.wait_idle()  # nobody claimed the first; a request that found no room makes it give way after a lease
        tokens = prompt(64, seed=2)
        params = prefill.prefill("third", tokens, [0, 1], chunk=64)
        assert params is not None
        decode.claim("d", tokens, params, BLOCKS)
        decode.wait_for(lambda: "d" in decode.received)
        assert decode.holds(tokens, BLOCKS)
        prefill.wait_idle()


def test_an_import_larger_than_its_share_of_the_arena_fails() -> None:
    tokens = prompt(65)
    with Engine(VEC) as prefill, Engine(VEC, arena_blocks=4) as decode:
        params = prefill.prefill("p", tokens, [0, 1, 2], chunk=65)
        assert params is not None
        decode.claim_fails("d", tokens, params, BLOCKS)
        decode.wait_idle()


def test_imports_wait_for_room_and_all_arrive() -> None:
    with Engine(VEC, arena_blocks=16) as prefill, Engine(VEC, arena_blocks=4) as decode:
        prompts = {f"d{number}": prompt(64, seed=number) for number in range(4)}
        for number, (request_id, tokens) in enumerate(prompts.items()):
            params = prefill.prefill(f"p{number}", tokens, [0, 1], chunk=64)
            assert params is not None
            decode.claim(request_id, tokens, params, [2 * number, 2 * number + 1])
        decode.wait_for(lambda: decode.received == set(prompts))
        assert not decode.failed
        for number, tokens in enumerate(prompts.values()):
            assert decode.holds(tokens, [2 * number, 2 * number + 1])
        decode.wait_idle()
        prefill.wait_idle()


def test_a_request_that_ends_while_its_kv_is_awaited_gives_vllm_its_blocks_back() -> None:
    with Engine(VEC) as prefill, Engine(VEC) as decode:
        tokens = prompt(70)
        prefill.side.on_new_request(NewRequest("p", tokens, {"do_remote_decode": True, "transfer_id": "t"}))
        params = prefill.transfer("t")
        decode.claim("d", tokens, params, BLOCKS)
        decode.step()
        decode.side.finished("d", aborted=True)
        decode.wait_for(lambda: "d" in decode.received)
        assert not decode.failed
        decode.wait_idle()


def test_an_error_of_our_own_fails_the_request_and_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    with Engine(VEC) as prefill, Engine(VEC) as decode:
        params = prefill.prefill("p", prompt(70), [0, 1, 2], chunk=70)
        assert params is not None
        assert decode.side._leader is not None
        with monkeypatch.context() as patch:
            patch.setattr(decode.side._leader.dialer, "open", broken)
            decode.claim_fails("d", prompt(70), params, BLOCKS)
        decode.wait_idle()
        decode.claim("next", prompt(70), params, BLOCKS)
        decode.wait_for(lambda: "next" in decode.received)
        assert decode.holds(prompt(70), BLOCKS[:3])


def test_strangers_who_hang_up_on_a_worker_end_nothing() -> None:
    tokens = prompt(70)
    with Engine(VEC) as prefill, Engine(VEC) as decode:
        address = decode.ranks[0].worker.handshake.transfer
        for said in (b"", b"no greeting of ZeroMQ's" * 10):
            with socket.create_connection((address.host, address.port)) as stranger:
                stranger.sendall(said)
        params = prefill.prefill("p", tokens, [0, 1, 2], chunk=70)
        assert params is not None
        decode.claim("d", tokens, params, BLOCKS)
        decode.wait_for(lambda: "d" in decode.received)
        assert decode.holds(tokens, BLOCKS[:3])
        assert not decode.failed


def test_a_hand_off_that_has_died_is_told_to_vllm_and_nobody_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    async def broken(_: PeerDialer) -> None:
        await asyncio.get_running_loop().run_in_executor(None, gate.wait)
        raise RuntimeError("a bug")

    with Engine(VEC) as prefill:
        monkeypatch.setattr(PeerDialer, "run", broken)
        with Engine(VEC) as decode:
            params = prefill.prefill("p", prompt(70), [0, 1, 2], chunk=70)
            assert params is not None
            decode.claim("d", prompt(70), params, BLOCKS)
            gate.set()
            with pytest.raises(TransferError, match="a bug"):
                decode.wait_for(lambda: False)


def test_a_prefill_that_ends_early_fails_its_reader() -> None:
    with Engine(VEC) as prefill, Engine(VEC) as decode:
        tokens = prompt(70)
        prefill.side.on_new_request(NewRequest("p", tokens, {"do_remote_decode": True, "transfer_id": "t"}))
        params = prefill.transfer("t")
        decode.claim("d", tokens, params, BLOCKS)
        prefill.step([Scheduled("p", 40, [0, 1, 2])])
        assert prefill.side.finished("p", aborted=True) is None
        decode.wait_for(lambda: "d" in decode.failed)
        prefill.wait_idle()
        decode.wait_idle()


def test_a_lease_that_nobody_renews_ends() -> None:
    with Engine(VEC, lease_ttl=1.0) as prefill:
        params = prefill.prefill("p", prompt(70), [0, 1, 2], chunk=70)
        assert params is not None
        prefill.side.on_new_request(NewRequest("q", prompt(300), {"do_remote_decode": True}))
        prefill.step([Scheduled("q", 300, list(range(10)))])  # finds no room: what is published gives way
        prefill.wait_idle()


def test_a_reader_that_falls_silent_keeps_the_blocks_for_one_lease() -> None:
    tokens = prompt(70)
    with Engine(VEC, lease_ttl=1.0) as prefill:
        prefill.side.on_new_request(NewRequest("p", tokens, {"do_remote_decode": True, "transfer_id": "t"}))
        with Engine(VEC) as decode:
            params = prefill.transfer("t")
            decode.claim("d", tokens, params, BLOCKS)
            kv = true_kv(tokens)
            prefill.step([Scheduled("p", 40, [0, 1, 2])], lambda: prefill.ranks[0].compute(kv, [0, 1, 2], 0, 40))
            decode.wait_for(lambda: bool(arena_block(decode, 0).any()))
        prefill.step([Scheduled("p", 70, [0, 1, 2])])
        assert prefill.side.finished("p", aborted=False) is not None
        prefill.wait_idle()
        assert prefill.side.take_counts()["leases_ended"] == 1


def test_two_engines_that_read_from_each_other_do_not_wait_for_ever() -> None:
    """Both arenas are full of exports that the other one wants."""
    with Engine(VEC, arena_blocks=4, engine_id="a") as one, Engine(VEC, arena_blocks=4, engine_id="b") as other:
        for mine, theirs in ((one, other), (other, one)):
            tokens = prompt(64)
            params = mine.prefill("p", tokens, [0, 1], chunk=64)
            assert params is not None
            theirs.claim("d", tokens, params, [8, 9])
        while one.received != {"d"} or other.received != {"d"}:
            one.step()
            other.step()
            time.sleep(0.005)
        assert not one.failed
        assert not other.failed
        assert one.holds(prompt(64), [8, 9])
        one.wait_idle()
        other.wait_idle()


@pytest.mark.parametrize("seed", range(3))
def test_whatever_ends_when_no_block_is_lost(seed: int) -> None:
    """Requests of all lengths come, are read, are given up or fail, in an arena that is too small for them."""
    chance = random.Random(seed)
    with Engine(VEC, arena_blocks=8, lease_ttl=1.0) as prefill, Engine(VEC, arena_blocks=6) as decode:
        open_requests: dict[str, tuple[list[int], list[int]]] = {}
        for number in range(25):
            tokens = prompt(chance.choice((1, 31, 32, 33, 64, 90)), seed=number)
            params: dict[str, Any] | None = prefill.prefill(f"p{number}", tokens, [0, 1, 2], chunk=32)
            if params is not None and chance.random() < 0.9:
                blocks = [3 * (number % 8), 3 * (number % 8) + 1, 3 * (number % 8) + 2]
                decode.wait_for(lambda blocks=blocks: blocks not in [b for _, b in open_requests.values()])  # type: ignore[misc]
                if decode.claim(f"d{number}", tokens, params, blocks):
                    open_requests[f"d{number}"] = tokens, blocks
            if open_requests and chance.random() < 0.2:
                ended = chance.choice(sorted(open_requests))
                decode.side.finished(ended, aborted=True)
                decode.wait_for(lambda ended=ended: ended in decode.received)  # type: ignore[misc]
                del open_requests[ended]
            for request_id in sorted(open_requests):
                if request_id in decode.received:
                    tokens, blocks = open_requests.pop(request_id)
                    assert request_id in decode.failed or decode.holds(tokens, blocks)
            decode.step()
        decode.wait_for(lambda: set(open_requests) <= decode.received)
        for request_id, (tokens, blocks) in open_requests.items():
            assert request_id in decode.failed or decode.holds(tokens, blocks)
        assert decode.side.take_counts()["handoffs"] > 0
        decode.wait_idle()
