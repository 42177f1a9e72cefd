"""One request's KV on its way to a decode engine. Pure; time is passed in."""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem.errors import WireError
from tandem.wire.peer_messages import KvComputed

ABANDONED_SECONDS = 20.0
"""A read that nobody wants any more may go on for this long; then its session ends, so that its blocks come back."""


@dataclass(slots=True, eq=False)
class Pull:
    """One request's reads: those to make, and those made.

    Chunks are announced by the prefill engine (`announced`), destination blocks are given by the scheduler
    (`allocated`); either may come first. What both allow is read at once (`next_read`).

    Attributes:
        remote_id: the request's name at the prefill engine.
        first_token_expected: the prefill engine samples the first token and sends it along.
        prompt: digest of its tokens.
        early: the prefill engine may not have heard of the request yet.
        session: number of the session that it was opened in.
        claim: number of its claim in that session; 0 until it is sent.
        claimed: that very claim was granted.
        heard_at: when its claim was sent, or the prefill engine last announced something.
        announced_tokens: tokens, from the start, whose KV the prefill engine has computed.
        wanted: tokens of the prompt; None if nobody has said yet.
        cached: tokens, from the start, that are here already and are not read.
        posted: tokens, from the start, that are here or being read.
        jobs: ranks by read job that may still write into the destination blocks.
        ended: why the KV is not wanted any more, or will not come.
        abandoned_at: when a look at the clock first found reads in progress for it although it has ended.
        corrupt: bytes came that do not fit their checksums.
    """

    request_id: str
    remote_id: str
    source_engine: str
    first_token_expected: bool
    prompt: str | None = None
    early: bool = True
    session: int = 0
    claim: int = 0
    claimed: bool = False
    heard_at: float = 0.0
    source_blocks: list[int] = field(default_factory=list)
    announced_tokens: int = 0
    final: bool = False
    final_at: float = 0.0
    first_token: int | None = None
    destination_blocks: list[int] | None = None
    wanted: int | None = None
    cached: int = 0
    posted: int = 0
    jobs: dict[int, set[int]] = field(default_factory=dict)
    ended: str | None = None
    abandoned_at: float | None = None
    corrupt: bool = False
    bytes: int = 0
    descriptors: int = 0
    job_seconds: dict[int, float] = field(default_factory=dict)

    def announced(self, message: KvComputed, now: float) -> None:
        """Take note of a chunk. Raises WireError if the one before it is missing."""
        if message.first_block > len(self.source_blocks):
            raise WireError(f"blocks from {message.first_block} on were announced, {len(self.source_blocks)} are known")
        self.source_blocks[message.first_block :] = message.block_ids
        self.announced_tokens = max(self.announced_tokens, message.num_tokens)
        self.heard_at = now
        if message.final:
            self.final = True
            self.first_token = message.first_token
            self.final_at = now

    def allocated(self, blocks: list[int], cached: int, wanted: int) -> None:
        self.destination_blocks = blocks
        self.wanted = wanted
        self.cached = self.posted = cached

    def contradiction(self, source_block_size: int) -> str | None:
        """Return why what was announced cannot be this prompt's KV; None if it can."""
        announced, covered = self.announced_tokens, len(self.source_blocks) * source_block_size
        if self.wanted is not None and covered - source_block_size >= self.wanted:
            return f"blocks for {covered} tokens were announced, and the prompt has {self.wanted}"
        if announced > covered:
            return f"{announced} tokens were announced, but blocks for {covered}"
        if self.wanted is not None and (announced > self.wanted or (self.final and announced < self.wanted)):
            return f"the prompt has {self.wanted} tokens here, {announced} there"
        return None

    def next_read(self, source_block_size: int) -> tuple[int, int] | None:
        """Return the tokens [start, stop) to read now; they count as posted.

        Whole source blocks, so that each is read once, until the last chunk.
        """
        if self.destination_blocks is None or self.ended is not None:
            return None
        stop = self.announced_tokens
        if not self.final:
            stop -= stop % source_block_size
        if stop <= self.posted:
            return None
        start, self.posted = self.posted, stop
        return start, stop

    def count(self, job: int, num_bytes: int, descriptors: int, seconds: float) -> None:
        """Add what a rank has read for one job."""
        self.bytes += num_bytes
        self.descriptors += descriptors
        self.job_seconds[job] = max(self.job_seconds.get(job, 0.0), seconds)

    @property
    def read_seconds(self) -> float:
        """Seconds that its reads took, each as long as on the slowest rank."""
        return sum(self.job_seconds.values())

    @property
    def reading(self) -> bool:
        """Return whether bytes may still arrive in its destination blocks."""
        return bool(self.jobs)

    def is_stuck(self, now: float) -> bool:
        """Return whether reads go on long after it ended; the first call that finds it ended begins the time."""
        if self.ended is None:
            return False
        if self.abandoned_at is None:
            self.abandoned_at = now
        return now - self.abandoned_at > ABANDONED_SECONDS

    @property
    def arrived(self) -> bool:
        """Return whether everything is here: the whole prompt is computed, and no read is in progress."""
        return (
            self.final
            and self.destination_blocks is not None
            and self.posted >= self.announced_tokens
            and not self.jobs
            and self.ended is None
        )
