"""The scheduler side: what vLLM's scheduler says goes to exports and imports, and what they ask to the leader."""

from __future__ import annotations

import logging
import queue
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tandem.checkpoint.fingerprint import fingerprint_in_background
from tandem.errors import StartError
from tandem.ids import prompt_digest
from tandem.transfer.transports.registry import connector_name
from tandem.vllm.arena_blocks import ArenaBlocks
from tandem.vllm.exports import Exports
from tandem.vllm.imports import Imports
from tandem.vllm.leader import Leader, LeaderEvent, OffersEnded, PullArrived, PullFailed, PullQuiet
from tandem.vllm.messages import RankHandshake, StepOrders, StepReport
from tandem.vllm.options import ConnectorOptions
from tandem.vllm.requests import ExportKv, Refused, read_params
from tandem.vllm.worker import ModelShape
from tandem.wire.messages import PullKv

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A request in a step: its tokens are computed up to `computed` once the step has run, in these blocks."""

    request_id: str
    computed: int
    blocks: Sequence[int]


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A request that has come. `refused`: why its KV must not be shared, whatever is asked."""

    request_id: str
    token_ids: Sequence[int]
    params: Mapping[str, Any] | None
    refused: str | None = None


class SchedulerSide:
    """One engine's; every method is for the thread of vLLM's scheduler.

    Args:
        producer, consumer: the role that vLLM was given.
        recompute: requests whose KV does not come are computed here; else vLLM fails them.
    """

    def __init__(
        self, options: ConnectorOptions, model: ModelShape, *, producer: bool, consumer: bool, recompute: bool
    ) -> None:
        self._options = options
        self._model = model
        self._producer, self._consumer, self._recompute = producer, consumer, recompute
        self._access = options.access
        self._fingerprint = fingerprint_in_background(model.path)
        self._leader: Leader | None = None
        self._exports: Exports | None = None
        self._imports: Imports | None = None
        self._arena: ArenaBlocks | None = None
        self._step = 0
        self._counts: dict[str, float] = {}
        self._expired = 0

    def take_counts(self) -> dict[str, float]:
        """Return what was counted since the last call."""
        counts, self._counts = self._counts, {}
        return counts

    def start(self, ranks: Sequence[RankHandshake]) -> None:
        """All workers are ready, by rank. Raises StartError or ConfigError."""
        if len({rank.identity for rank in ranks}) != 1:
            raise StartError(f"the workers have several identities: {', '.join(str(r.identity) for r in ranks)}")
        blocks = min(rank.descriptor.layout.blocks for rank in ranks)
        share = 1.0 if not self._consumer else 0.5 if self._producer else 0.0
        arena = self._arena = ArenaBlocks(blocks, self._model.block_size, share)
        connector = connector_name(self._options.connector)
        fingerprint = " ".join(filter(None, (self._fingerprint.result(), self._model.variant)))
        leader = self._leader = Leader(
            self._options, ranks, fingerprint, self._model.dtype, connector, int(blocks * share)
        )
        self._exports = Exports(arena, _Offering(leader))
        self._imports = Imports(arena, _Pulling(leader), recompute=self._recompute)
        leader.start()
        log.info("engine %s listens at %s; arena of %d blocks", leader.identity, leader.address, blocks)

    def stop(self) -> None:
        if self._leader is not None:
            self._leader.stop()

    @property
    def idle(self) -> bool:
        """Whether no arena block is in use, as far as is known here."""
        self._take_events()
        exports, imports, _ = self._started
        return not exports and not imports

    # --- hooks ---------------------------------------------------------------------------------------------------

    def on_new_request(self, request: NewRequest) -> None:
        """A request has come: claim or offer its KV if that is asked."""
        exports, imports, _ = self._started
        asked = read_params(request.params, request.request_id, self._access) if request.params else None
        num_tokens = len(request.token_ids)
        if asked is not None and request.refused is not None:
            asked = Refused(request.refused) if isinstance(asked, ExportKv | PullKv) else asked
        match asked:
            case ExportKv(remote_id=remote_id, published=published) if self._producer:
                digest = prompt_digest(request.token_ids)
                refused = exports.begin(request.request_id, remote_id, digest, num_tokens, published=published)
                if refused is not None:
                    log.warning("request %s: %s", request.request_id, refused)
            case PullKv() if self._consumer:
                imports.begin(request.request_id, asked, prompt_digest(request.token_ids), num_tokens)
            case ExportKv() | PullKv():
                log.warning("request %s: kv_transfer_params do not fit this engine's kv_role", request.request_id)
            case Refused(reason=reason):
                log.warning("request %s: no hand-off: %s", request.request_id, reason)
                if request.params and request.params.get("do_remote_prefill"):
                    imports.begin_failed(request.request_id, num_tokens, reason)

    def matched_tokens(self, request_id: str, computed: int) -> int:
        """Return how many tokens beyond the first `computed` are loaded, asynchronously."""
        self._take_events()
        _, imports, _ = self._started
        return imports.wanted(request_id, computed)

    def allocated(self, request_id: str, blocks: Sequence[int], wanted: int) -> None:
        """vLLM has blocks for the request, and waits for its last `wanted` tokens if that is not 0."""
        _, imports, _ = self._started
        if wanted:
            imports.allocated(request_id, blocks, wanted)

    def is_export(self, request_id: str) -> bool:
        """Whether vLLM shall tell of this request when it is scheduled."""
        return self._exports is not None and request_id in self._exports

    def build_orders(self, scheduled: Sequence[Scheduled]) -> StepOrders:
        """Return what the workers shall do in the step that is about to run."""
        self._take_events()
        exports, imports, _ = self._started
        self._step += 1
        copies = [exports.scheduled(each.request_id, each.blocks, each.computed, self._step) for each in scheduled]
        orders = imports.take_orders(self._step)
        return StepOrders(
            self._step, [copy for copy in copies if copy is not None], orders.imports, orders.failed, orders.dropped
        )

    def step_done(self, report: StepReport) -> None:
        """All workers have done a step."""
        exports, imports, arena = self._started
        arena.step_done(report.step)
        exports.step_done(report.step)
        self._take_events()
        imports.make_room()

    def finished(self, request_id: str, *, aborted: bool) -> dict[str, Any] | None:
        """The request has ended. Returns the parameters by which another engine finds its KV, if it is offered.

        `aborted`: nobody waits for the request any more.
        """
        exports, imports, _ = self._started
        self._take_events()
        imports.finished(request_id)
        if self._leader is None or request_id not in exports:
            return None
        remote_id = exports.finished(request_id, aborted=aborted)
        if remote_id is None:
            self._count(exports_refused=int(not aborted))
            return None
        self._count(exports=1)
        identity, address = self._leader.identity, self._leader.address
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": identity.engine_id,
            "remote_incarnation": identity.incarnation,
            "remote_request_id": remote_id,
            "remote_host": address.host,
            "remote_port": address.port,
            "remote_block_ids": None,
        }

    # --- inside --------------------------------------------------------------------------------------------------

    def _count(self, **counts: float) -> None:
        for name, count in counts.items():
            self._counts[name] = self._counts.get(name, 0) + count

    @property
    def _started(self) -> tuple[Exports, Imports, ArenaBlocks]:
        if self._exports is None or self._imports is None or self._arena is None:
            raise StartError("the workers' handshake metadata did not come before the first request")
        return self._exports, self._imports, self._arena

    def _take_events(self) -> None:
        if self._leader is not None:
            self._leader.check()
        while self._leader is not None:
            try:
                event = self._leader.events.get_nowait()
            except queue.Empty:
                return
            self._handle(event)

    def _handle(self, event: LeaderEvent) -> None:
        exports, imports, _ = self._started
        match event:
            case OffersEnded(request_ids=request_ids, expired=expired):
                self._count(leases_ended=expired - self._expired)
                self._expired = expired
                for remote_id in request_ids:
                    exports.ended(remote_id)
                imports.make_room()
            case PullArrived(request_id=request_id):
                self._count(handoffs=1, bytes=event.bytes, descriptors=event.descriptors, read_seconds=event.seconds)
                imports.arrived(request_id)
            case PullFailed(request_id=request_id, reason=reason):
                self._count(failures=1)
                imports.failed(request_id, reason)
            case PullQuiet(request_id=request_id):
                imports.quiet(request_id)


class _Offering:
    """The listener, in its own thread."""

    def __init__(self, leader: Leader) -> None:
        self._leader = leader

    def begin(self, remote_id: str, prompt: str, *, published: bool) -> None:
        self._leader.call(lambda: self._leader.listener.begin(remote_id, prompt, published=published))

    def chunk(self, remote_id: str, first_block: int, blocks: list[int], num_tokens: int, final: bool) -> None:
        listener = self._leader.listener
        self._leader.call(lambda: listener.chunk(remote_id, first_block, blocks, num_tokens, final, None))

    def abort(self, remote_id: str, reason: str) -> None:
        self._leader.call(lambda: self._leader.listener.abort(remote_id, reason))

    def withdraw(self, remote_id: str) -> None:
        self._leader.call(lambda: self._leader.listener.withdraw(remote_id))

    def short_of_blocks(self, short: bool) -> None:
        self._leader.call(lambda: self._leader.listener.short_of_blocks(short))


class _Pulling:
    """The dialer, in its own thread."""

    def __init__(self, leader: Leader) -> None:
        self._leader = leader

    def open(self, request_id: str, source: PullKv, prompt: str, num_tokens: int) -> None:
        def claim() -> None:
            try:
                self._leader.dialer.open(request_id, source, prompt, num_tokens)
            except Exception:  # our own error: vLLM must not wait for ever
                log.exception("request %s: its KV cannot be claimed", request_id)
                self._leader.events.put(PullFailed(request_id, "it could not be claimed"))
                self._leader.events.put(PullQuiet(request_id))

        self._leader.call(claim)

    def allocated(self, request_id: str, blocks: list[int], cached: int, num_tokens: int) -> None:
        self._leader.call(lambda: self._leader.dialer.allocated(request_id, blocks, cached, num_tokens))

    def give_up(self, request_id: str, reason: str) -> None:
        self._leader.call(lambda: self._leader.dialer.give_up(request_id, reason))
