"""The decode side of a hand-off: what one request still has to read. Pure; time is passed in."""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem.errors import WireError
from tandem.wire.peer_messages import KvComputed


@dataclass(slots=True)
class Pull:
    """KV of one request on its way here.

    Chunks are announced by the prefill engine (`announced`), destination blocks are given by the scheduler
    (`allocated`); either may come first. What both allow is read at once (`next_read`).

    Attributes:
        first_token_expected: the prefill engine samples the first token and sends it along.
        prompt: digest of its tokens.
        early: the prefill engine may not have heard of the request yet.
        wanted: tokens of the prompt; None until the scheduler has said.
        cached: tokens, from the start, that are here already and are not read.
        posted: tokens, from the start, that are here or being read.
        jobs: ranks that have not yet reported, by read job.
        gave_up: why the request no longer wants what is being read.
    """

    request_id: str
    remote_id: str
    source_engine: str
    first_token_expected: bool
    prompt: str | None = None
    early: bool = True
    source_blocks: list[int] = field(default_factory=list)
    ready: int = 0
    final: bool = False
    first_token: int | None = None
    destination_blocks: list[int] | None = None
    wanted: int | None = None
    cached: int = 0
    posted: int = 0
    jobs: dict[int, set[int]] = field(default_factory=dict)
    gave_up: str | None = None
    bytes: int = 0
    descriptors: int = 0
    job_seconds: dict[int, float] = field(default_factory=dict)
    final_at: float = 0.0
    heard_at: float = 0.0

    def announced(self, message: KvComputed, now: float) -> None:
        if message.first_block > len(self.source_blocks):
            raise WireError(f"blocks from {message.first_block} on were announced, {len(self.source_blocks)} are known")
        self.source_blocks[message.first_block :] = message.block_ids
        self.ready = max(self.ready, message.num_tokens)
        if message.final:
            self.final = True
            self.first_token = message.first_token
            self.final_at = now

    def allocated(self, blocks: list[int], cached: int, wanted: int) -> None:
        self.destination_blocks = blocks
        self.wanted = wanted
        self.cached = self.posted = cached

    def contradiction(self, source_block_size: int) -> str | None:
        """Why what was announced cannot be this prompt's KV, if it cannot."""
        if self.ready > len(self.source_blocks) * source_block_size:
            return f"{self.ready} tokens were announced, but blocks for {len(self.source_blocks) * source_block_size}"
        if self.wanted is not None and (self.ready > self.wanted or (self.final and self.ready < self.wanted)):
            return f"the prompt has {self.wanted} tokens here, {self.ready} there"
        return None

    def next_read(self, source_block_size: int) -> tuple[int, int] | None:
        """Tokens [start, stop) to read now. Whole source blocks, so that a block is read once, until the last chunk."""
        if self.destination_blocks is None or self.gave_up is not None:
            return None
        stop = self.ready if self.final else self.ready - self.ready % source_block_size
        stop = min(stop, len(self.source_blocks) * source_block_size)
        if stop <= self.posted:
            return None
        start, self.posted = self.posted, stop
        return start, stop

    @property
    def read_seconds(self) -> float:
        """What its reads took, each as long as the slowest rank."""
        return sum(self.job_seconds.values())

    @property
    def reading(self) -> bool:
        return bool(self.jobs)

    @property
    def arrived(self) -> bool:
        """Everything is here; `jobs` in progress and a prompt that is still being computed speak against it."""
        return (
            self.final
            and self.destination_blocks is not None
            and self.posted >= self.ready
            and not self.jobs
            and self.gave_up is None
        )
