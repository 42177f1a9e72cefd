"""vLLM's real scheduler with the connector, and ranks without a model: they write known values as a kernel would."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from tandem.vllm.messages import StepOrders
from tandem.vllm.pages import VEC
from tandem.vllm.worker import ModelShape
from tests.vllm.engine import BLOCKS, DIM, KV_HEADS, LAYERS, Meeting, Rank, ThreadWorld, true_kv

WAIT_SECONDS = 30.0


class SchedulerEngine:
    """One engine.

    Attributes:
        finished: outputs of requests that have ended: finish reason and parameters.
        wrong: where a token would have been computed over KV that is not that of its prefix.
        preempted: how often a request was preempted.
        counts: what the connector has counted, as vLLM asks for it after each step.
    """

    def __init__(
        self,
        model: Path,
        *,
        tp: int = 1,
        block_size: int = 32,
        blocks: int = BLOCKS,
        arena_blocks: int = 16,
        max_num_batched_tokens: int = 64,
        policy: str = "recompute",
        **options: Any,
    ) -> None:
        block_bytes = max(1, KV_HEADS // tp) * LAYERS * 2 * block_size * DIM * 4
        options = {"connector": "tcp", "arena_gib": (arena_blocks + 0.5) * block_bytes / (1 << 30), **options}
        config = _config(model, block_size, blocks, max_num_batched_tokens, policy, options)
        spec = FullAttentionSpec(block_size=block_size, num_kv_heads=KV_HEADS // tp, head_size=DIM, dtype=torch.float32)
        names = [f"model.layers.{layer}.self_attn.attn" for layer in range(LAYERS)]
        cache = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(names, spec)])
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(block_size, sha256)
        meeting = Meeting(tp)
        shape = ModelShape(str(model), "m", "float32", LAYERS, KV_HEADS, block_size, 1024)
        with ThreadPoolExecutor(tp) as pool:
            made = [pool.submit(Rank, ThreadWorld(meeting, r, tp, 1), shape, VEC, options, "e") for r in range(tp)]
            self.ranks = [each.result() for each in made]
        self.scheduler = Scheduler(config, cache, StructuredOutputManager(config), block_size)
        self.connector = self.scheduler.get_kv_connector()
        self.connector.set_xfer_handshake_metadata_pp_aware(
            {(0, r): k.worker.handshake for r, k in enumerate(self.ranks)}
        )
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self._free_at_start = self.pool.get_num_free_blocks()
        self.finished: dict[str, Any] = {}
        self.wrong: list[str] = []
        self.counts: dict[str, float] = {}
        self.preempted = 0
        self._take_stats = self.connector.get_kv_connector_stats
        self.connector.get_kv_connector_stats = self._count

    def _count(self) -> Any:
        stats = self._take_stats()
        for name, count in (stats.data if stats else {}).items():
            self.counts[name] = self.counts.get(name, 0) + count
        return stats

    def __enter__(self) -> SchedulerEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.connector.shutdown()

    def add(self, request_id: str, tokens: list[int], params: dict[str, Any] | None, max_tokens: int = 1) -> None:
        extra = {"kv_transfer_params": params} if params else None
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, extra_args=extra)
        sampling.update_from_generation_config({}, 2)
        self.scheduler.add_request(Request(request_id, tokens, sampling, None, block_hasher=self._hasher))

    def abort(self, request_id: str) -> None:
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def step(self) -> None:
        """Schedule, "compute", and give the results to the scheduler."""
        output = self.scheduler.schedule()
        self.preempted += len(output.preempted_req_ids or ())
        orders: StepOrders = output.kv_connector_metadata
        for request_id, count in output.num_scheduled_tokens.items():
            request = self.scheduler.requests[request_id]
            self._compute(request, request.num_computed_tokens - count, request.num_computed_tokens)
        received: list[set[str]] = []
        failed: set[str] = set()
        for rank in self.ranks:
            rank.worker.load(orders)
            rank.worker.save(orders)
            results = rank.worker.take_results()
            received.append(results.received)
            failed |= results.failed
        assert all(each == received[0] for each in received)
        ids = list(output.num_scheduled_tokens)
        sampled = [self._sample(request_id) for request_id in ids]
        connector_output = KVConnectorOutput(
            finished_recving=received[0] or None,
            failed_recving=failed,
            kv_connector_worker_meta=self.ranks[0].worker.report(orders),
        )
        results_of_step = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: index for index, request_id in enumerate(ids)},
            sampled_token_ids=sampled,
            kv_connector_output=connector_output,
        )
        for outputs in self.scheduler.update_from_output(output, results_of_step).values():
            for one in outputs.outputs:
                if one.finish_reason is not None:
                    self.finished[one.request_id] = one

    def _compute(self, request: Request, start: int, stop: int) -> None:
        """Check that all before `start` is there, as attention would read it, then write the tokens' KV."""
        tokens = list(request.all_token_ids)[:stop]
        blocks = self.scheduler.kv_cache_manager.get_block_ids(request.request_id)[0]
        kv = true_kv(tokens)
        for rank in self.ranks:
            if not rank.holds(kv, blocks, 0, start):
                self.wrong.append(f"{request.request_id} at {start}")
            rank.compute(kv, blocks, start, stop)

    def _sample(self, request_id: str) -> list[int]:
        request = self.scheduler.requests[request_id]
        done = request.num_computed_tokens >= request.num_tokens
        return [(sum(request.all_token_ids) * 31 + request.num_tokens) % 97] if done else []

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"it did not come to be in time; ended: {sorted(self.finished)}"
            self.step()

    def wait_idle(self) -> None:
        """Run until neither vLLM nor the arena holds a block."""
        side = self.connector._scheduler
        self.wait_for(lambda: not self.scheduler.requests and side.idle)
        self.step()
        assert self.pool.get_num_free_blocks() == self._free_at_start
        arena = side._arena
        assert arena is not None
        assert arena.available == arena._pool.num_blocks

    def prefill(self, request_id: str, tokens: list[int]) -> dict[str, Any] | None:
        """Compute a prompt for another engine; returns its parameters."""
        self.add(request_id, tokens, {"do_remote_decode": True})
        self.wait_for(lambda: request_id in self.finished)
        params: dict[str, Any] | None = self.finished[request_id].kv_transfer_params
        return params


def _config(
    model: Path, block_size: int, blocks: int, max_num_batched_tokens: int, policy: str, options: dict[str, Any]
) -> Any:
    arguments = EngineArgs(
        model=str(model),
        dtype="float32",
        enforce_eager=True,
        block_size=block_size,
        max_model_len=1024,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=16,
        async_scheduling=False,
        kv_transfer_config=KVTransferConfig(
            kv_connector="TandemConnector",  # known by the entry point
            kv_role="kv_both",
            kv_load_failure_policy=policy,
            kv_connector_extra_config=options,
        ),
    )
    config = arguments.create_engine_config()
    config.cache_config.num_gpu_blocks = blocks
    config.cache_config.block_size = block_size
    return config


def prompts(count: int, length: Callable[[int], int]) -> Sequence[list[int]]:
    return [[(7 * index + 13 * number) % 97 for index in range(length(number))] for number in range(count)]
