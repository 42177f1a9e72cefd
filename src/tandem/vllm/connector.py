"""The connector interface of vLLM 0.32 (distributed/kv_transfer/kv_connector/v1/base.py) over Tandem's two sides."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from tandem.errors import ConfigError, StartError
from tandem.model_folder import find_model
from tandem.vllm.messages import RankHandshake, StepOrders, StepReport
from tandem.vllm.options import parse_options
from tandem.vllm.scheduler import NewRequest, Scheduled, SchedulerSide
from tandem.vllm.self_test import cpu_kernel, find_page_layout
from tandem.vllm.stats import TandemPromMetrics, TandemStats
from tandem.vllm.worker import ModelShape, Worker
from tandem.vllm.world import GroupWorld


class TandemConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]  # vLLM may not be installed
    """Made by vLLM, once in the scheduler's process and once in each worker's."""

    _cache_hit_source = CacheHitSource.P2P

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        _log_as_vllm_does()
        transfer = vllm_config.kv_transfer_config
        options = parse_options(transfer.kv_connector_extra_config)
        self._model = _model_shape(vllm_config, kv_cache_config)
        self._cache_dtype: str = vllm_config.cache_config.cache_dtype
        if role is KVConnectorRole.WORKER:
            self._worker = Worker(options, self._model, _world(vllm_config.parallel_config), transfer.engine_id)
        else:
            self._scheduler = SchedulerSide(
                options,
                self._model,
                producer=transfer.is_kv_producer,
                consumer=transfer.is_kv_consumer,
                recompute=transfer.kv_load_failure_policy == "recompute",
            )

    @property
    def requires_kv_delivery(self) -> bool:
        """A preempted request may finish: what was computed is in the arena already."""
        return False

    def shutdown(self) -> None:
        if self.role is KVConnectorRole.SCHEDULER:
            self._scheduler.stop()

    # --- metrics -------------------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> TandemStats | None:
        """Return what the scheduler side has counted since the last call; workers count nothing."""
        counts = self._scheduler.take_counts() if self.role is KVConnectorRole.SCHEDULER else {}
        return TandemStats(data=dict(counts)) if counts else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> TandemStats:
        return TandemStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, *arguments: Any) -> TandemPromMetrics:
        return TandemPromMetrics(*arguments)

    # --- worker side ---------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        first = next(iter(kv_caches.values()))
        if first.device.type != "cpu" or first.dim() != 4 or first.shape[2] != self._model.block_size:
            raise StartError(
                "TandemConnector serves vLLM's CPU backend, caches [blocks, heads, block_size, 2 * head_dim];"
                f" got {tuple(first.shape)} on {first.device}"
            )
        _, heads, block_size, width = first.shape
        kernel = cpu_kernel(first.dtype, block_size, width // 2, self._cache_dtype)
        self._worker.register(kv_caches, find_page_layout(kernel, heads, block_size, width // 2, first.dtype))

    def get_handshake_metadata(self) -> RankHandshake:
        return self._worker.handshake

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._worker.load(self._orders)

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        self._worker.save(self._orders)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        results = self._worker.take_results()
        return KVConnectorTransferResults(finished_recving=results.received, failed_recving=results.failed)

    def build_connector_worker_meta(self) -> StepReport:
        return self._worker.report(self._orders)

    @property
    def _orders(self) -> StepOrders:
        orders: StepOrders = self._get_connector_metadata()
        return orders

    # --- scheduler side ------------------------------------------------------------------------------------------

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], RankHandshake]) -> None:
        self._scheduler.start([metadata[place] for place in sorted(metadata)])

    def on_new_request(self, request: Any) -> None:
        self._scheduler.on_new_request(
            NewRequest(
                request.request_id,
                request.prompt_token_ids or (),
                request.kv_transfer_params,
                _not_covered_by_the_prompt(request),
            )
        )

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        wanted = self._scheduler.matched_tokens(request.request_id, num_computed_tokens)
        return wanted, wanted > 0

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        groups: tuple[int, ...] = self._kv_cache_config.transfer_group_ids
        return groups

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens:
            self._scheduler.allocated(request.request_id, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepOrders:
        before = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        cached = scheduler_output.scheduled_cached_reqs
        before |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        return self._scheduler.build_orders(
            [
                Scheduled(request_id, before[request_id] + count, self._blocks_of(request_id))
                for request_id, count in scheduler_output.num_scheduled_tokens.items()
                if self._scheduler.is_export(request_id)
            ]
        )

    def _blocks_of(self, request_id: str) -> list[int]:
        blocks: list[int] = self._kv_cache_manager.get_block_ids(request_id)[0]
        return blocks

    def update_connector_output(self, connector_output: Any) -> None:
        report = connector_output.kv_connector_worker_meta
        if report is not None:
            self._scheduler.step_done(report)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        from vllm.v1.request import RequestStatus

        aborted = request.status is RequestStatus.FINISHED_ABORTED
        return False, self._scheduler.finished(request.request_id, aborted=aborted)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[0])


def _log_as_vllm_does() -> None:
    """Let what Tandem logs in this process go where vLLM's own lines go: it sets up its own logger alone."""
    ours, theirs = logging.getLogger("tandem"), logging.getLogger("vllm")
    if not ours.handlers:
        ours.handlers, ours.propagate = list(theirs.handlers), False
        ours.setLevel(theirs.getEffectiveLevel())


def _not_covered_by_the_prompt(request: Any) -> str | None:
    """Return what decides the KV beside the prompt's tokens, whose digest would not tell."""
    for name, what in (
        ("lora_request", "a LoRA adapter"),
        ("mm_features", "images or other media"),
        ("prompt_embeds", "embeddings"),
    ):
        if getattr(request, name, None):
            return f"a prompt with {what} is not handed off"
    return None


def _world(parallel: Any) -> GroupWorld:
    """Return the ranks of this engine. Raises ConfigError for ways to spread a context that are not known here."""
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    for name in ("prefill_context_parallel_size", "decode_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise ConfigError(f"TandemConnector does not support {name} {getattr(parallel, name)}; leave it at 1")
    tp, pp = get_tp_group(), get_pp_group()
    return GroupWorld(tp.cpu_group if tp.world_size > 1 else None, pp.cpu_group if pp.world_size > 1 else None)


def _model_shape(vllm_config: Any, kv_cache_config: Any) -> ModelShape:
    """Return what is served. Raises ConfigError if its KV is of a kind that cannot be handed off."""
    model, groups = vllm_config.model_config, kv_cache_config.kv_cache_groups
    spec = groups[0].kv_cache_spec
    if len(groups) > 1 or type(spec) is not FullAttentionSpec:
        kinds = ", ".join(type(group.kv_cache_spec).__name__ for group in groups)
        raise ConfigError(f"TandemConnector serves models with one group of full attention; this one has {kinds}")
    dtype = str(spec.dtype).removeprefix("torch.")
    if vllm_config.cache_config.cache_dtype not in ("auto", dtype) or spec.dtype != model.dtype:
        raise ConfigError(f"TandemConnector needs KV in the model's dtype; got {vllm_config.cache_config.cache_dtype}")
    if model.hf_overrides:
        raise ConfigError("TandemConnector does not know what --hf-overrides change; put it into the model's folder")
    folder = find_model(model.model).path
    if model.revision is not None and folder != str(model.model):
        raise ConfigError("TandemConnector needs the folder of a model to tell it from its other revisions; give that")
    return ModelShape(
        path=folder,
        name=str(model.model),
        dtype=dtype,
        num_layers=model.get_total_num_hidden_layers(),
        num_kv_heads=model.get_total_num_kv_heads(),
        block_size=spec.block_size,
        max_model_len=model.max_model_len,
        variant=_variant(model),
    )


def _variant(model: Any) -> str:
    """Return what decides the KV beside the model's folder: weights that vLLM quantises as it loads them."""
    in_folder = getattr(model.hf_config, "quantization_config", None) is not None
    return f"quantization {model.quantization}" if model.quantization is not None and not in_folder else ""
