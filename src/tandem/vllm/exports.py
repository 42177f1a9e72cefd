"""The producer's half of the scheduler side: prompts whose KV is exported step by step and announced after each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tandem.vllm.arena_blocks import ArenaBlocks
from tandem.vllm.messages import Copy


class Offering(Protocol):
    """The listener, reached through its thread's queue: every call returns at once and is done later, in order."""

    def begin(self, remote_id: str, prompt: str, *, published: bool) -> None: ...

    def chunk(self, remote_id: str, first_block: int, blocks: list[int], num_tokens: int, final: bool) -> None: ...

    def abort(self, remote_id: str, reason: str) -> None: ...

    def withdraw(self, remote_id: str) -> None: ...

    def short_of_blocks(self, short: bool) -> None: ...


@dataclass(slots=True)
class _Export:
    """One prompt.

    Attributes:
        blocks: in the arena; None until it is first scheduled.
        exported: tokens, from the start, that steps so far were told to export.
        last_step: the last of them.
        closed: nothing more is exported: all is, or the request has ended.
    """

    remote_id: str
    num_tokens: int
    blocks: list[int] | None = None
    exported: int = 0
    last_step: int = 0
    closed: bool = False


@dataclass(frozen=True, slots=True)
class _Announcement:
    step: int
    announce: Callable[[], None]


class Exports:
    """All prompts that other engines decode. By request id of vLLM, and by the name under which they are offered."""

    def __init__(self, arena: ArenaBlocks, offering: Offering) -> None:
        self._arena = arena
        self._offering = offering
        self._by_request: dict[str, _Export] = {}
        self._by_remote_id: dict[str, _Export] = {}
        self._announcements: deque[_Announcement] = deque()
        self._done = 0

    def __len__(self) -> int:
        """Prompts whose arena blocks are not given back yet."""
        return len(self._by_remote_id)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_request

    def begin(self, request_id: str, remote_id: str, prompt: str, num_tokens: int, *, published: bool) -> str | None:
        """A request has come whose prompt is to be offered. Returns why it is not; then it is computed all the same."""
        if remote_id in self._by_remote_id:
            return f"the KV of {remote_id} is offered already"
        self._by_request[request_id] = self._by_remote_id[remote_id] = _Export(remote_id, num_tokens)
        self._offering.begin(remote_id, prompt, published=published)
        return None

    def scheduled(self, request_id: str, vllm_blocks: Sequence[int], computed: int, step: int) -> Copy | None:
        """Step `step` computes the request's tokens up to `computed`, in these blocks. Returns what it shall export."""
        export = self._by_request[request_id]
        stop = min(computed, export.num_tokens)
        if export.closed or stop <= export.exported or not self._has_blocks(export):
            return None
        size = self._arena.block_size
        first, end = export.exported // size, self._arena.blocks_for(stop)
        blocks = (export.blocks or [])[first:end]
        export.exported, export.last_step = stop, step
        export.closed = stop == export.num_tokens
        remote_id, final = export.remote_id, export.closed
        self._announcements.append(
            _Announcement(step, lambda: self._offering.chunk(remote_id, first, blocks, stop, final))
        )
        return Copy(list(vllm_blocks[first:end]), blocks)

    def _has_blocks(self, export: _Export) -> bool:
        if export.blocks is None:
            export.blocks = self._arena.for_export(self._arena.blocks_for(export.num_tokens))
            self._offering.short_of_blocks(export.blocks is None)
            if export.blocks is None:
                export.closed = True
                self._offering.abort(export.remote_id, "the arena has no room for it")
        return export.blocks is not None

    def step_done(self, step: int) -> None:
        """All workers have done this step: announce what it exported."""
        self._done = max(self._done, step)
        while self._announcements and self._announcements[0].step <= self._done:
            self._announcements.popleft().announce()

    def finished(self, request_id: str, *, aborted: bool) -> str | None:
        """The request has ended. Returns the name under which its whole prompt is offered; None if it is not."""
        export = self._by_request.pop(request_id)
        remote_id = export.remote_id
        if export.blocks is not None and export.exported == export.num_tokens:
            if aborted:  # nobody is told of its KV any more
                self._offering.withdraw(remote_id)
            return remote_id
        export.closed = True
        if remote_id in self._by_remote_id:
            # After what earlier steps have still to announce: an offer takes no chunk once it is aborted.
            end = _Announcement(export.last_step, lambda: self._offering.abort(remote_id, "its prefill ended early"))
            self._announcements = deque(sorted([*self._announcements, end], key=lambda each: each.step))
            self.step_done(self._done)
        return None

    def ended(self, remote_id: str) -> None:
        """No reader needs the arena blocks any more."""
        export = self._by_remote_id.pop(remote_id)
        export.closed = True
        if export.blocks is not None:
            self._arena.free(export.blocks, after=export.last_step, exported=True)
