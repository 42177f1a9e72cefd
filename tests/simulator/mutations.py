"""Breaks the real code in ways that somebody could: a simulator that notices none of them is no proof.

Each mutation puts others in the place of one or two methods for the time of a run.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from tandem.engine.step.step_loop import StepLoop
from tandem.kv.blocks import BlockPool
from tandem.kv.lease import ReaderLeases
from tandem.router.engine_connections import EngineConnections
from tandem.router.first_token import OutputMerger
from tandem.scheduling.scheduler import Scheduler
from tandem.scheduling.state import SchedulerState
from tandem.transfer.decode.pull import Pull
from tandem.transfer.decode.pulls import Pulls
from tandem.transfer.decode.session import Session, Target
from tandem.transfer.decode.sessions import Sessions
from tandem.transfer.prefill.listener import PeerListener
from tandem.transfer.prefill.offers import Offers
from tandem.transfer.thread.transfer_thread import TransferThread
from tandem.wire.peer_messages import Hello, Release

Patch = tuple[Any, str, Callable[[Any], Any]]
"""A class, the name of a method, and what makes of the method that is there the one that takes its place."""


def _always(value: object) -> Callable[[Any], Any]:
    return lambda original: lambda *args, **kwargs: value


def _nothing(original: Any) -> Any:
    return lambda *args, **kwargs: None


def _any_incarnation(original: Any) -> Any:
    """A prefill engine takes messages that are meant for an earlier life of it for its own."""

    def handle(self: PeerListener, client: bytes, message: Any) -> None:
        if not isinstance(message, Hello):
            message = msgspec.structs.replace(message, to=self._identity.incarnation)
        original(self, client, message)

    return handle


def _any_source(original: Any) -> Any:
    """A decode engine takes whoever answers for the incarnation that it meant."""

    def told(self: Pulls, session: Session, message: Any, now: float) -> None:
        if hasattr(message, "source"):
            message = msgspec.structs.replace(message, source=session.incarnation)
        original(self, session, message, now)

    return told


def _good_ever(original: Any) -> Any:
    return lambda self, request_id, completed_at: request_id in self._leases


def _count_from_answer(original: Any) -> Any:
    def claimed(self: ReaderLeases, request_id: str) -> None:
        original(self, request_id)
        lease = self._leases.get(request_id)
        if lease is not None:
            lease.valid_until = time.monotonic() + self.ttl

    return claimed


def _free_at_once(original: Any) -> Any:
    """Blocks go back when the request has ended, whoever reads them."""

    def quarantine(self: SchedulerState, request: Any) -> bool:
        return False

    return quarantine


def _quiet_too_early(original: Any) -> Any:
    """A read that failed and may still write counts as quiet."""

    def read_ended(self: Pulls, report: Any, now: float) -> None:
        original(self, msgspec.structs.replace(report, may_still_write=False), now)

    return read_ended


def _settle_early(original: Any) -> Any:
    """The first rank whose read has ended speaks for all."""

    def rank_is_quiet(self: Pulls, pull: Pull, job: int, rank: int) -> None:
        pull.jobs[job].clear()
        del pull.jobs[job], self._jobs[job]

    return rank_is_quiet


def _believes_every_token(original: Any) -> Any:
    """What came already is told again."""

    def add(self: OutputMerger, message: Any) -> tuple[list[int], None]:
        self.tokens += message.token_ids
        return list(message.token_ids), None

    return add


def _abort_is_lost(original: Any) -> Any:
    """An engine is not told that a client has left."""

    def close(self: EngineConnections, stream: Any, *, keep: bool = False) -> None:
        self._streams.pop((stream.engine.sender, stream.request_id), None)
        stream.finish()

    return close


def _no_release(original: Any) -> Any:
    """Blocks that were read are not released: the lease has to run out, and the pull is forgotten all the same."""

    def remove(self: Session, pull: Pull) -> Release | None:
        original(self, pull)
        return None

    return remove


def _reads_on(original: Any) -> Any:
    """What is announced is read a block too far."""

    def next_read(self: Pull, source_block_size: int) -> tuple[int, int] | None:
        if not self.final and self.destination_blocks is not None and self.ended is None:
            stop = min(len(self.source_blocks) * source_block_size, self.wanted or 0)
            if stop > self.posted:
                start, self.posted = self.posted, stop
                return start, stop
        return original(self, source_block_size)  # type: ignore[no-any-return]

    return next_read


def _sessions_stay(original: Any) -> Any:
    """Sessions with engines that have left are kept."""

    def introduce(self: Sessions, message: Any, now: float) -> None:
        for peer in message.peers:
            self.open(Target(peer.identity.engine_id, peer.identity.incarnation, peer.address), True, now)

    return introduce


def _computes_one_less(original: Any) -> Any:
    """KV that a peer brought counts as one token longer than it is."""

    def kv_arrived(self: Scheduler, request_id: str, first_token: int | None, now: float) -> None:
        original(self, request_id, first_token, now)
        request = self.get(request_id)
        if request is not None and first_token is not None and request.num_pending == 1:
            request.tokens[-1] = (first_token + 1) % 1000

    return kv_arrived


def _sleeps_on_results(original: Any) -> Any:
    """A step that only applies a result counts as one with nothing to do, though the next batch waited for it."""

    def step(self: StepLoop) -> bool:
        submitted = self._scheduler._next_batch_id
        original(self)
        return self._scheduler._next_batch_id == submitted

    return step


MUTATIONS: Mapping[str, Sequence[Patch]] = {
    "the lease is not looked at when a read ends": [(ReaderLeases, "good", _good_ever)],
    "leases are not looked at at all": [(ReaderLeases, "good", _good_ever), (ReaderLeases, "run_out", _always([]))],
    "blocks with reads in progress go back at once": [(SchedulerState, "quarantine_reads", _free_at_once)],
    "a read that may still write counts as ended": [(Pulls, "_read_ended", _quiet_too_early)],
    "one rank's end of a read speaks for all ranks": [(Pulls, "_rank_is_quiet", _settle_early)],
    "quarantine never ends": [(Scheduler, "read_ended", _nothing)],
    "tokens that came already are told again": [(OutputMerger, "add", _believes_every_token)],
    "what two engines made of one text is joined": [(OutputMerger, "_check", _nothing)],
    "engines are not told of clients that leave": [(EngineConnections, "close", _abort_is_lost)],
    "blocks that were read are not released": [(Session, "remove", _no_release)],
    "chunks are read before they are computed": [(Pull, "next_read", _reads_on)],
    "sessions with engines that left are kept": [(Sessions, "introduce", _sessions_stay)],
    "the first token that came with the KV is another": [(Scheduler, "kv_arrived", _computes_one_less)],
    "offers do not end with the lease": [(Offers, "expire", _nothing)],
    "ended leases are not told to the pool": [(BlockPool, "unlease", _nothing)],
    "ranks stay connected when a session ends": [(TransferThread, "_close", _nothing)],
    "requests have no deadline on the engine": [(Scheduler, "expire", _nothing)],
    "the step loop sleeps when a result has come": [(StepLoop, "_step", _sleeps_on_results)],
}

MASKED: Mapping[str, Sequence[Patch]] = {
    "a lease counts from the answer, not from the claim": [(ReaderLeases, "claimed", _count_from_answer)],
    "incarnations are not looked at": [(PeerListener, "_handle", _any_incarnation), (Pulls, "_told", _any_source)],
}
"""Other checks keep these from doing harm: one of thousands of schedules shows them, or none."""


@contextlib.contextmanager
def broken(name: str) -> Iterator[None]:
    """Break the real code in this way for a while."""
    patches = MUTATIONS.get(name) or MASKED[name]
    before = [(owner, method, getattr(owner, method)) for owner, method, _ in patches]
    for owner, method, make in patches:
        setattr(owner, method, make(getattr(owner, method)))
    try:
        yield
    finally:
        for owner, method, original in before:
            setattr(owner, method, original)
