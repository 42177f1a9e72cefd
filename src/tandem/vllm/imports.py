"""The consumer's half of the scheduler side: requests whose KV is read into the arena, then imported by all ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from tandem.vllm.arena_blocks import ArenaBlocks
from tandem.vllm.messages import Copy
from tandem.wire.messages import PullKv


class Pulling(Protocol):
    """The dialer, reached through its thread's queue: every call returns at once and is done later, in order."""

    def open(self, request_id: str, source: PullKv, prompt: str, num_tokens: int) -> None: ...

    def allocated(self, request_id: str, blocks: list[int], cached: int, num_tokens: int) -> None: ...

    def give_up(self, request_id: str, reason: str) -> None: ...


class _State(Enum):
    CLAIMED = "claimed"
    """vLLM has no blocks for it yet."""
    WAITING = "waiting"
    """vLLM has; the arena has no room."""
    READING = "reading"
    ARRIVED = "arrived"
    """In the arena; a step shall import it."""
    OVER = "over"
    """vLLM knows, or will with the next step; the arena blocks may still be written to."""


@dataclass(slots=True)
class _Import:
    """One request.

    Attributes:
        arena_blocks: for the tokens from `cached` on.
        failed: why its KV does not come.
        quiet: no byte arrives in its arena blocks any more.
    """

    num_tokens: int
    state: _State = _State.CLAIMED
    cached: int = 0
    vllm_blocks: list[int] = field(default_factory=list)
    arena_blocks: list[int] = field(default_factory=list)
    step: int = 0
    failed: str | None = None
    quiet: bool = False

    @property
    def vllm_waits(self) -> bool:
        return self.state not in (_State.CLAIMED, _State.OVER)


@dataclass(slots=True)
class ImportOrders:
    imports: dict[str, Copy] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


class Imports:
    """All requests whose prompt another engine computes.

    Args:
        recompute: requests whose KV does not come are computed here; else vLLM fails them.
    """

    def __init__(self, arena: ArenaBlocks, pulling: Pulling, *, recompute: bool) -> None:
        self._arena = arena
        self._pulling = pulling
        self._recompute = recompute
        self._imports: dict[str, _Import] = {}
        self._waiting: deque[str] = deque()
        self._orders = ImportOrders()

    def __len__(self) -> int:
        """Requests that hold arena blocks, or may come to."""
        return len(self._imports)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._imports

    # --- what vLLM says ------------------------------------------------------------------------------------------

    def begin(self, request_id: str, source: PullKv, prompt: str, num_tokens: int) -> None:
        """A request has come: claim its KV."""
        self._imports[request_id] = _Import(num_tokens)
        self._pulling.open(request_id, source, prompt, num_tokens)

    def begin_failed(self, request_id: str, num_tokens: int, reason: str) -> None:
        """A request has come whose KV cannot be asked for."""
        self._imports[request_id] = _Import(num_tokens, failed=reason, quiet=True)

    def wanted(self, request_id: str, computed: int) -> int:
        """Return how many tokens beyond the first `computed` are loaded: the rest of the prompt, or none."""
        one = self._imports.get(request_id)
        if one is None or one.state is not _State.CLAIMED:
            return 0
        if one.num_tokens <= computed:
            self._forget_claim(request_id, one, "all of it is here already")
            return 0
        if one.failed is not None and self._recompute:
            self._forget_claim(request_id, one, one.failed)
            return 0
        return one.num_tokens - computed

    def allocated(self, request_id: str, vllm_blocks: Sequence[int], wanted: int) -> None:
        """vLLM has blocks for the request and waits until its last `wanted` tokens are in them."""
        one = self._imports[request_id]
        one.cached = one.num_tokens - wanted
        one.vllm_blocks = list(vllm_blocks)
        one.state = _State.WAITING
        if one.failed is not None:
            self._tell_failed(request_id, one)
            return
        if self._needed(one) > self._arena.max_import:
            one.failed = "it needs more blocks than the arena has"
            self._pulling.give_up(request_id, one.failed)
            self._tell_failed(request_id, one)
            return
        self._waiting.append(request_id)
        self.make_room()

    def finished(self, request_id: str) -> None:
        """The request has ended, perhaps while its KV was on its way."""
        one = self._imports.get(request_id)
        if one is None or one.state is _State.OVER:
            return
        if one.state is _State.CLAIMED:
            self._forget_claim(request_id, one, "the request has ended")
        elif one.state in (_State.WAITING, _State.READING):
            self._pulling.give_up(request_id, "the request has ended")
            self._orders.dropped.append(request_id)
            one.state = _State.OVER
            self._settle(request_id, one)
        # One that has arrived is imported all the same: vLLM keeps its blocks until it hears so.

    def take_orders(self, step: int) -> ImportOrders:
        """Return what the workers shall do in step `step`."""
        orders, self._orders = self._orders, ImportOrders()
        for request_id in orders.imports:
            one = self._imports[request_id]
            one.state, one.step = _State.OVER, step
            one.quiet = True
            self._settle(request_id, one)
        return orders

    # --- what the leader says ------------------------------------------------------------------------------------

    def arrived(self, request_id: str) -> None:
        """All KV of the request is in its arena blocks."""
        one = self._imports.get(request_id)
        if one is None:
            return
        if one.state is not _State.READING:  # it was given up at the same time
            one.quiet = True
            self._settle(request_id, one)
            return
        one.state = _State.ARRIVED
        first, size = one.cached // self._arena.block_size, len(one.arena_blocks)
        self._orders.imports[request_id] = Copy(one.vllm_blocks[first : first + size], one.arena_blocks)

    def failed(self, request_id: str, reason: str) -> None:
        """Its KV does not come."""
        one = self._imports.get(request_id)
        if one is None or one.state is _State.OVER:
            return
        one.failed = reason
        if one.vllm_waits:
            self._tell_failed(request_id, one)

    def quiet(self, request_id: str) -> None:
        """No byte arrives in its arena blocks any more."""
        one = self._imports.get(request_id)
        if one is not None:
            one.quiet = True
            self._settle(request_id, one)

    def make_room(self) -> None:
        """Give arena blocks to those that wait for them, in order."""
        while self._waiting:
            one = self._imports.get(self._waiting[0])
            if one is None or one.state is not _State.WAITING:
                self._waiting.popleft()
                continue
            blocks = self._arena.for_import(self._needed(one))
            if blocks is None:
                return
            request_id = self._waiting.popleft()
            one.arena_blocks, one.state = blocks, _State.READING
            # By block of the prompt; those before are here already and are not read.
            table = [0] * (one.cached // self._arena.block_size) + blocks
            self._pulling.allocated(request_id, table, one.cached, one.num_tokens)

    # --- inside --------------------------------------------------------------------------------------------------

    def _needed(self, one: _Import) -> int:
        return self._arena.blocks_for(one.num_tokens) - one.cached // self._arena.block_size

    def _tell_failed(self, request_id: str, one: _Import) -> None:
        self._orders.failed.append(request_id)
        one.state = _State.OVER
        self._settle(request_id, one)

    def _forget_claim(self, request_id: str, one: _Import, reason: str) -> None:
        if one.failed is None:
            self._pulling.give_up(request_id, reason)
        del self._imports[request_id]

    def _settle(self, request_id: str, one: _Import) -> None:
        """Give back the arena blocks of a request that is over, once nothing is written there any more."""
        if one.state is _State.OVER and (one.quiet or not one.arena_blocks):
            del self._imports[request_id]
            if one.arena_blocks:
                self._arena.free(one.arena_blocks, after=one.step)
                self.make_room()
