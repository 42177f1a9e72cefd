"""T2: both sides of the connector without vLLM and without a model, any shape to any shape."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from tandem.vllm.pages import AMX, VEC
from tandem.vllm.scheduler import NewRequest, Scheduled
from tandem.wire.keys import new_key_file
from tests.vllm.engine import Engine, true_kv

PROMPTS = (1, 31, 32, 33, 150)


def prompt(length: int, seed: int = 0) -> list[int]:
    return [(7 * index + seed) % 97 for index in range(length)]


@pytest.mark.parametrize("connector", ["tcp", "nixl"])
@pytest.mark.parametrize("length", PROMPTS)
def test_a_prompt_arrives_whole_and_every_block_comes_back(length: int, connector: str) -> None:
    tokens = prompt(length)
    with Engine(VEC, connector=connector) as prefill, Engine(AMX, connector=connector) as decode:
        params = prefill.prefill("p", tokens, [9, 3, 7, 1, 5], chunk=64)
        assert params is not None
        assert decode.claim("d", tokens, params, [2, 4, 6, 8, 10]) == length
        decode.wait_for(lambda: "d" in decode.received)
        assert not decode.failed
        assert decode.holds(tokens, [2, 4, 6, 8, 10])
        decode.side.finished("d", aborted=False)
        decode.wait_idle()
        prefill.wait_idle()


SHAPES = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)]  # 4 > 2 KV heads: replicated


@pytest.mark.parametrize("theirs", SHAPES, ids=lambda shape: "tp{}pp{}".format(*shape))
@pytest.mark.parametrize("ours", SHAPES, ids=lambda shape: "tp{}pp{}".format(*shape))
def test_any_shape_hands_off_to_any_shape(theirs: tuple[int, int], ours: tuple[int, int]) -> None:
    tokens = prompt(70)
    with (
        Engine(VEC, tp=theirs[0], pp=theirs[1]) as prefill,
        Engine(VEC, tp=ours[0], pp=ours[1]) as decode,
    ):
        params = prefill.prefill("p", tokens, [3, 1, 2], chunk=40)
        assert params is not None
        decode.claim("d", tokens, params, [5, 9, 7])
        decode.wait_for(lambda: "d" in decode.received)
        assert not decode.failed
        assert decode.holds(tokens, [5, 9, 7])


@pytest.mark.parametrize(("theirs", "ours"), [(32, 64), (64, 32), (32, 96), (96, 32), (64, 96)])
def test_block_sizes_need_not_divide_each_other(theirs: int, ours: int) -> None:
    tokens = prompt(150)
    with Engine(VEC, block_size=theirs) as prefill, Engine(AMX, block_size=ours) as decode:
        params = prefill.prefill("p", tokens, [4, 0, 3, 1, 2], chunk=50)
        assert params is not None
        decode.claim("d", tokens, params, [9, 5, 7, 6, 8])
        decode.wait_for(lambda: "d" in decode.received)
        assert not decode.failed
        assert decode.holds(tokens, [9, 5, 7, 6, 8])


def test_what_the_decode_side_has_is_not_loaded_again() -> None:
    tokens = prompt(100)
    with Engine(VEC) as prefill, Engine(VEC) as decode:
        params = prefill.prefill("p", tokens, [0, 1, 2, 3], chunk=100)
        assert params is not None
        assert decode.claim("d", tokens, params, [4, 5, 6, 7], cached=64) == 36
        decode.wait_for(lambda: "d" in decode.received)
        assert decode.holds(tokens, [4, 5, 6, 7], start=64)
        assert not decode.ranks[0].read(4).any()
        decode.wait_idle()
        prefill.wait_idle()


def test_a_prompt_that_is_here_entirely_is_released() -> None:
    tokens = prompt(64)
    with Engine(VEC) as prefill, Engine(VEC) as decode:
        params = prefill.prefill("p", tokens, [0, 1], chunk=64)
        assert params is not None
        assert decode.claim("d", tokens, params, [4, 5], cached=64) == 0
        decode.wait_idle()


def test_a_cluster_key_is_needed_by_both(tmp_path: Path) -> None:
    tokens = prompt(40)
    keys = [str(tmp_path / name) for name in ("ours", "theirs")]
    for key in keys:
        new_key_file(Path(key))
    with (
        Engine(VEC, tp=2, cluster_key_file=keys[0]) as prefill,
        Engine(VEC, tp=2, cluster_key_file=keys[0]) as member,
        Engine(VEC, cluster_key_file=keys[1]) as stranger,
    ):
        params = prefill.prefill("p", tokens, [3, 1], chunk=40)
        assert params is not None
        for engine in (stranger, member):
            engine.claim("d", tokens, params, [5, 9])
            engine.wait_for(lambda engine=engine: "d" in engine.received)  # type: ignore[misc]
        assert stranger.failed == {"d"}
        assert not member.failed
        assert member.holds(tokens, [5, 9])


@pytest.mark.parametrize(("producer", "consumer"), [(True, False), (False, True)])
def test_an_engine_of_one_role_has_the_whole_arena_for_it(producer: bool, consumer: bool) -> None:
    tokens = prompt(96)
    other = {"producer": True, "consumer": True}
    roles = {"producer": producer, "consumer": consumer, "arena_blocks": 3}
    with (
        Engine(VEC, **(roles if producer else other)) as prefill,
        Engine(VEC, **(roles if consumer else other)) as decode,
    ):
        params = prefill.prefill("p", tokens, [3, 1, 2], chunk=96)
        assert params is not None
        assert decode.claim("d", tokens, params, [5, 9, 7]) == 96
        decode.wait_for(lambda: "d" in decode.received)
        assert not decode.failed
        assert decode.holds(tokens, [5, 9, 7])


def arena_block(engine: Engine, place: int) -> Tensor:
    """Return what the first rank's arena has for the block at this place of its only import."""
    [one] = engine.side._started[1]._imports.values()
    arena = engine.ranks[0].worker._arena
    assert arena is not None
    return arena.kv[one.arena_blocks[place]]


def test_both_engines_at_once_stream_by_chunks() -> None:
    """The claim comes before the request: what a step has computed is read while the next one runs."""
    tokens = prompt(150)
    kv, blocks, theirs = true_kv(tokens), [4, 0, 3, 1, 2], [9, 5, 7, 6, 8]
    with Engine(VEC, tp=2) as prefill, Engine(VEC) as decode:
        params = prefill.transfer("t")
        assert decode.claim("d", tokens, params, theirs) == 150
        prefill.side.on_new_request(NewRequest("p", tokens, {"do_remote_decode": True, "transfer_id": "t"}))

        def forward(start: int, stop: int) -> None:
            for rank in prefill.ranks:
                rank.compute(kv, blocks, start, stop)

        for start, stop in ((0, 70), (70, 140)):
            prefill.step([Scheduled("p", stop, blocks)], lambda start=start, stop=stop: forward(start, stop))  # type: ignore[misc]
            whole = stop // 32  # blocks that are read before the prompt is done
            decode.wait_for(lambda whole=whole: bool(arena_block(decode, whole - 1).any()))  # type: ignore[misc]
            assert "d" not in decode.received
        prefill.step([Scheduled("p", 150, blocks)], lambda: forward(140, 150))
        assert prefill.side.finished("p", aborted=False) is not None
        decode.wait_for(lambda: "d" in decode.received)
        assert not decode.failed
        assert decode.holds(tokens, theirs)
        decode.wait_idle()
        prefill.wait_idle()
