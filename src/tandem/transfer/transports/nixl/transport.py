"""Transport over NIXL with UCX underneath: shared memory, TCP, RDMA, GPU memory.

What NIXL and UCX promise and what they do not, as measured with NIXL 1.5.1:

- Within one host a post copies the bytes in the calling thread (process_vm_readv, without the GIL), so a long read
  is posted in pieces, a few at each `poll`.
- A read that was posted cannot be called back. Releasing its handle, and even removing the remote agent, succeeds
  at once, and yet the bytes arrive when a peer that was stopped continues. So a peer that is disconnected stays
  known to NIXL, and its reads stay IN_PROGRESS, until NIXL says of each that it ended. They end as FAILED then.
- The first error on a connection is its last: UCX gives it up, so one failed piece means a lost peer. It makes several
  requests of a piece and reports the first error while others may be under way. So a read that failed by an error is
  FAILING until its peer is disconnected and a grace time has passed. A peer whose
  process was killed is noticed by the next read; the same name can be added again once it was removed.
- With the settings of its Python class the progress thread of an agent never sleeps, so each rank would take a whole
  core; with a delay it sleeps until UCX has an event. See `agent.PROGRESS_DELAY_MICROSECONDS`.
- A reader whose agent vanishes in the middle of a read over TCP can make UCX abort the *serving* process, so
  `close` gives reads in progress a moment to end.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tandem.errors import PeerLost, TransferError
from tandem.kv.runs import Runs
from tandem.transfer.transports.base import RankEndpoint, ReadState, Region
from tandem.transfer.transports.bounds import runs_inside
from tandem.transfer.transports.nixl.agent import NixlAgent, NixlError, Transfer

log = logging.getLogger(__name__)

PIECE_BYTES = 8 * 1024 * 1024
PIECE_RUNS = 512
MAX_PIECES_IN_FLIGHT = 32
POST_SECONDS = 0.005
CLOSE_SECONDS = 2.0

GRACE_SECONDS = 1.0
"""Parts of a read that failed may still be under way for this long after its peer's connection was torn down."""

_DIGEST_BYTES = 16


class NixlRead:
    """A read in pieces: some wait, some are in flight.

    Attributes:
        may_write: UCX gave it up with an error, and says nothing of the requests that it had made of a piece.
    """

    def __init__(self, runs: Runs) -> None:
        self.error: str | None = None
        self.may_write = False
        self.waiting = deque(runs.pieces(PIECE_BYTES, PIECE_RUNS))
        self.in_flight: list[Transfer] = []

    @property
    def ended(self) -> bool:
        return not self.waiting and not self.in_flight

    @property
    def state(self) -> ReadState:
        if not self.ended:
            return ReadState.IN_PROGRESS
        if self.error is None:
            return ReadState.DONE
        return ReadState.FAILING if self.may_write else ReadState.FAILED

    def fail(self, error: str) -> None:
        """Post no more of it; pieces in flight are waited for. The first error stays."""
        self.waiting.clear()
        self.error = self.error or error


@dataclass(slots=True)
class _Peer:
    """A remote agent that NIXL knows.

    Attributes:
        lost: the first error of a read from it; nothing is read from it any more.
        leaving: disconnected, but reads from it have not ended.
    """

    endpoint: RankEndpoint
    lost: str | None = None
    leaving: bool = False
    reads: list[NixlRead] = field(default_factory=list)


class NixlTransport:
    """See `base.Transport`.

    Args:
        agent: unique name of this rank in this incarnation of its engine.
    """

    def __init__(self, agent: str) -> None:
        self._name = agent
        self._agent = NixlAgent(agent)
        self._region: Region | None = None
        self._peers: dict[str, _Peer] = {}
        self._failing: deque[tuple[float, NixlRead]] = deque()  # in order of the time at which they are quiet
        self._in_flight = 0
        self._closed = False

    def register(self, region: Region) -> None:
        if self._region is not None:
            raise TransferError("memory is registered already")
        try:
            self._agent.register(region)
        except NixlError as error:
            memory = "DRAM" if region.device < 0 else "VRAM"
            raise TransferError(f"NIXL cannot register {region.length} bytes of {memory}: {error}") from error
        self._region = region

    def describe(self) -> RankEndpoint:
        region = self._registered()
        metadata = self._agent.metadata()
        return RankEndpoint(self._name, _digest(metadata) + metadata, region)

    def connect(self, peer: RankEndpoint) -> None:
        self._registered()
        known = self._peers.get(peer.agent)
        if known is not None:
            self._reconnect(known, peer)
            return
        metadata = _checked_metadata(peer)
        try:
            name = self._agent.add_remote(metadata)
        except NixlError as error:
            raise TransferError(f"NIXL does not take the metadata of {peer.agent}: {error}") from error
        if name != peer.agent:
            if name not in self._peers:
                self._agent.remove_remote(name)
            raise TransferError(f"the metadata of {peer.agent} is that of another agent, {name}")
        self._peers[peer.agent] = _Peer(peer)
        try:
            self._agent.connect(peer.agent)
        except NixlError as error:
            self.disconnect(peer.agent)
            raise PeerLost(f"NIXL cannot connect to {peer.agent}: {error}") from error

    def _reconnect(self, known: _Peer, peer: RankEndpoint) -> None:
        """Take back a peer that is leaving; its old reads stay given up."""
        if known.lost is not None:
            raise PeerLost(f"{peer.agent} was lost ({known.lost}) and its last reads have not ended")
        if known.endpoint != peer:
            raise TransferError(f"{peer.agent} is connected with another region or other metadata")
        known.leaving = False

    def disconnect(self, agent: str) -> None:
        peer = self._peers.get(agent)
        if peer is None:
            return
        peer.leaving = True
        for read in peer.reads:
            read.fail(f"disconnected from {agent}")
        self._drop_ended(peer)

    def post(self, agent: str, runs: Runs) -> NixlRead:
        region = self._registered()
        peer = self._peers.get(agent)
        if peer is None or peer.leaving:
            raise TransferError(f"{agent} is not connected")
        if peer.lost is not None:
            raise PeerLost(f"{agent} is lost: {peer.lost}")
        read = NixlRead(runs_inside(runs, peer.endpoint.region, region))
        peer.reads.append(read)
        if read.waiting and self._in_flight < MAX_PIECES_IN_FLIGHT:
            self._post_piece(peer, read)
        self._drop_ended(peer)
        return read

    def poll(self) -> None:
        for peer in self._peers.values():
            for read in peer.reads:
                for transfer in list(read.in_flight):
                    self._check(peer, read, transfer)
        self._post_pieces()
        for peer in list(self._peers.values()):
            self._drop_ended(peer)
        while self._failing and self._failing[0][0] <= time.monotonic():
            self._failing.popleft()[1].may_write = False

    def wait_on(self) -> Sequence[Any]:
        """Return nothing: NIXL has no descriptor to wait on. While reads are in progress, poll on a timer."""
        return ()

    def close(self) -> None:
        """Wait up to CLOSE_SECONDS for reads in progress. After it no byte is written."""
        if self._closed:
            return
        deadline = time.monotonic() + CLOSE_SECONDS
        for agent in list(self._peers):
            self.disconnect(agent)
        while self._peers and time.monotonic() < deadline:
            self.poll()
            time.sleep(0.001)
        self._closed = True
        self._agent.close()
        reads = [read for peer in self._peers.values() for read in peer.reads]
        for read in [*reads, *(read for _, read in self._failing)]:
            read.in_flight.clear()
            read.may_write = False
        self._peers.clear()
        self._failing.clear()

    # --- progress of reads -------------------------------------------------------------------------------------

    def _post_pieces(self) -> None:
        """Post pieces of all reads in turn, for a few milliseconds at most as a post may copy them itself."""
        until = time.monotonic() + POST_SECONDS
        turns = deque((peer, read) for peer in self._peers.values() for read in peer.reads if read.waiting)
        while turns and self._in_flight < MAX_PIECES_IN_FLIGHT:
            peer, read = turns.popleft()
            if not read.waiting:
                continue
            self._post_piece(peer, read)
            turns.append((peer, read))
            if time.monotonic() > until:
                return

    def _post_piece(self, peer: _Peer, read: NixlRead) -> None:
        piece = read.waiting.popleft()
        try:
            transfer = self._agent.post_read(peer.endpoint.agent, peer.endpoint.region, self._registered(), piece)
        except NixlError as error:
            self._lose(peer, str(error))
            return
        read.in_flight.append(transfer)
        self._in_flight += 1
        self._check(peer, read, transfer)

    def _check(self, peer: _Peer, read: NixlRead, transfer: Transfer) -> None:
        """Look at a piece in flight; release it if it ended."""
        try:
            if not self._agent.is_done(transfer):
                return
        except NixlError as error:
            self._lose(peer, str(error))
        read.in_flight.remove(transfer)
        self._in_flight -= 1
        try:
            self._agent.release(transfer)
        except NixlError as error:
            log.warning("NIXL does not release a read from %s that ended: %s", peer.endpoint.agent, error)

    def _lose(self, peer: _Peer, error: str) -> None:
        peer.lost = peer.lost or error
        for read in peer.reads:
            read.fail(f"read from {peer.endpoint.agent} failed: {error}")
            read.may_write = True

    def _drop_ended(self, peer: _Peer) -> None:
        """Drop reads that ended, and with the last one a peer that is leaving."""
        peer.reads = [read for read in peer.reads if not read.ended or read.may_write]
        if not peer.leaving or not all(read.ended for read in peer.reads):
            return
        del self._peers[peer.endpoint.agent]
        try:
            self._agent.remove_remote(peer.endpoint.agent)
        except NixlError as error:
            log.debug("NIXL has forgotten %s by itself: %s", peer.endpoint.agent, error)
        self._failing.extend((time.monotonic() + GRACE_SECONDS, read) for read in peer.reads)

    def _registered(self) -> Region:
        if self._closed:
            raise TransferError("the transport is closed")
        if self._region is None:
            raise TransferError("no memory is registered yet")
        return self._region


def _digest(metadata: bytes) -> bytes:
    return hashlib.blake2b(metadata, digest_size=_DIGEST_BYTES).digest()


def _checked_metadata(peer: RankEndpoint) -> bytes:
    """Return NIXL's own metadata. UCX trusts it, so damaged metadata must not get there."""
    digest, metadata = peer.metadata[:_DIGEST_BYTES], peer.metadata[_DIGEST_BYTES:]
    if digest != _digest(metadata):
        raise TransferError(f"the metadata of {peer.agent} ({len(peer.metadata)} bytes) is not NIXL's or is damaged")
    return metadata
