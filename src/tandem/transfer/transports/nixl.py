"""Transport over NIXL with UCX underneath: shared memory, TCP, RDMA, GPU memory. The only file that imports nixl.

What NIXL does and does not promise, as measured with version 1.5.1:

- Within one host a post copies the bytes in the calling thread (process_vm_readv, without the GIL), so a long read
  is posted in pieces, a few at each `poll`.
- A read that was posted cannot be called back. Releasing its handle, and even removing the remote agent, succeeds
  at once, and yet the bytes arrive when a peer that was stopped continues. So a peer that is disconnected stays
  known to NIXL, and its reads stay IN_PROGRESS, until NIXL says of each that it ended. They end as FAILED then.
- With the settings of its Python class the progress thread of an agent never sleeps, so each rank would take a whole
  core; with a delay it sleeps until UCX has an event. See `_new_agent`.
- A reader whose agent vanishes in the middle of a read over TCP can make UCX abort the *serving* process, so
  `close` gives reads in progress a moment to end.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tandem.errors import ConfigError, PeerLost, TransferError
from tandem.transfer.transports.base import RankEndpoint, ReadState, Region
from tandem.transfer.transports.runs import Runs, checked_runs

log = logging.getLogger(__name__)

PIECE_BYTES = 8 * 1024 * 1024
PIECE_RUNS = 512
MAX_PIECES_IN_FLIGHT = 32
POST_SECONDS = 0.005
CLOSE_SECONDS = 2.0

# The progress thread wakes up with every event of UCX, and after this long without any. Measured for ranks on two
# busy cores: idle share of a core 0.67 -> 0.01, 64 MiB over TCP 268 -> 120 ms, 8 bytes over TCP 6.0 -> 0.6 ms.
PROGRESS_DELAY_MICROSECONDS = 5_000

_DIGEST_BYTES = 16
_BACKEND = "UCX"


class NixlRead:
    """A read in pieces: some wait, some are in flight. Not IN_PROGRESS means that no byte of it can arrive any more."""

    def __init__(self, runs: Runs) -> None:
        self.error: str | None = None
        self._waiting: Iterator[Runs] = runs.pieces(PIECE_BYTES, PIECE_RUNS)
        self._next = next(self._waiting, None)
        self.in_flight: deque[Any] = deque()

    @property
    def state(self) -> ReadState:
        if self.in_flight or (self._next is not None and self.error is None):
            return ReadState.IN_PROGRESS
        return ReadState.DONE if self.error is None else ReadState.FAILED

    @property
    def wants_post(self) -> bool:
        return self._next is not None and self.error is None

    def take_piece(self) -> Runs:
        piece, self._next = self._next, next(self._waiting, None)
        assert piece is not None  # ours to check: see `wants_post`
        return piece

    def fail(self, error: str) -> None:
        """Post no more of it; what is in flight is waited for. The first error stays."""
        self.error = self.error or error


@dataclass(slots=True)
class _Peer:
    endpoint: RankEndpoint
    lost: str | None = None
    leaving: bool = False
    reads: list[NixlRead] = field(default_factory=list)


class NixlTransport:
    """See `base.Transport`.

    Args:
        agent: unique name of this rank in this life of its engine.
        host: not used: UCX puts every address of this machine into its metadata.
    """

    def __init__(self, agent: str, host: str) -> None:
        nixl = _import_nixl()
        self._agent_name = agent
        try:
            self._nixl = _new_agent(nixl, agent)
        except Exception as error:
            raise ConfigError(f"NIXL does not start: {_words(error)}; try `--connector tcp`") from error
        if _BACKEND not in self._nixl.backends:
            raise ConfigError("this installation of NIXL has no UCX plugin; reinstall it or use `--connector tcp`")
        self._region: Region | None = None
        self._registration: Any = None
        self._peers: dict[str, _Peer] = {}
        self._in_flight = 0
        self._closed = False

    def register(self, region: Region) -> None:
        if self._region is not None:
            raise TransferError("memory is registered already")
        try:
            self._registration = self._nixl.register_memory(
                [(region.address, region.length, max(region.device, 0), "")], _memory_type(region)
            )
        except Exception as error:
            raise TransferError(
                f"NIXL cannot register {region.length} bytes of {_memory_type(region)}: {_words(error)}"
            ) from error
        self._region = region

    def describe(self) -> RankEndpoint:
        region = self._registered()
        metadata: bytes = self._nixl.get_agent_metadata()
        return RankEndpoint(self._agent_name, _digest(metadata) + metadata, region)

    def connect(self, peer: RankEndpoint) -> None:
        self._registered()
        known = self._peers.get(peer.agent)
        if known is not None:
            self._reconnect(known, peer)
            return
        metadata = _checked_metadata(peer)
        try:
            name = self._nixl.add_remote_agent(metadata)
        except Exception as error:
            raise TransferError(f"NIXL does not take the metadata of {peer.agent}: {_words(error)}") from error
        name = name.decode() if isinstance(name, bytes) else str(name)
        if name != peer.agent:
            if name not in self._peers:
                self._nixl.remove_remote_agent(name)
            raise TransferError(f"the metadata of {peer.agent} is that of another agent, {name}")
        self._peers[peer.agent] = _Peer(peer)
        try:
            self._nixl.make_connection(peer.agent)
        except Exception as error:
            self.disconnect(peer.agent)
            raise PeerLost(f"NIXL cannot connect to {peer.agent}: {_words(error)}") from error

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
        self._forget_if_left(peer)

    def post(
        self, agent: str, source: NDArray[np.int64], destination: NDArray[np.int64], length: NDArray[np.int64]
    ) -> NixlRead:
        region = self._registered()
        peer = self._peers.get(agent)
        if peer is None or peer.leaving:
            raise TransferError(f"{agent} is not connected")
        if peer.lost is not None:
            raise PeerLost(f"{agent} is lost: {peer.lost}")
        runs = checked_runs(source, destination, length, peer.endpoint.region.length, region.length)
        read = NixlRead(runs)
        peer.reads.append(read)
        if read.wants_post and self._in_flight < MAX_PIECES_IN_FLIGHT:
            self._post_piece(peer, read)
        self._drop_ended(peer)
        return read

    def poll(self) -> None:
        for peer in list(self._peers.values()):
            for read in peer.reads:
                self._check(peer, read)
        self._post_pieces()
        for peer in list(self._peers.values()):
            self._drop_ended(peer)
            self._forget_if_left(peer)

    def wait_on(self) -> Sequence[Any]:
        """Nothing: NIXL has no descriptor to wait on. While reads are in progress, poll on a timer."""
        return ()

    def close(self) -> None:
        """Waits up to CLOSE_SECONDS for reads in progress. After it no byte is written: nobody moves them on."""
        if self._closed:
            return
        deadline = time.monotonic() + CLOSE_SECONDS
        for agent in list(self._peers):
            self.disconnect(agent)
        while self._peers and time.monotonic() < deadline:
            self.poll()
            time.sleep(0.001)
        self._closed = True
        for peer in self._peers.values():
            for read in peer.reads:
                read.in_flight.clear()
        self._peers.clear()
        if self._registration is not None:
            self._nixl.deregister_memory(self._registration)
        del self._nixl

    # --- moving reads forward ----------------------------------------------------------------------------------

    def _post_pieces(self) -> None:
        """Post pieces of all reads in turn, for a few milliseconds at most as a post may copy them itself."""
        until = time.monotonic() + POST_SECONDS
        waiting = deque((peer, read) for peer in self._peers.values() for read in peer.reads if read.wants_post)
        while waiting and self._in_flight < MAX_PIECES_IN_FLIGHT:
            peer, read = waiting.popleft()
            if not read.wants_post:
                continue
            self._post_piece(peer, read)
            waiting.append((peer, read))
            if time.monotonic() > until:
                return

    def _post_piece(self, peer: _Peer, read: NixlRead) -> None:
        piece = read.take_piece()
        remote = peer.endpoint.region
        here = self._registered()
        try:
            handle = self._nixl.initialize_xfer(
                "READ",
                self._descriptors(here, piece.destination, piece.length),
                self._descriptors(remote, piece.source, piece.length),
                peer.endpoint.agent,
            )
            state = self._nixl.transfer(handle)
        except Exception as error:
            self._lose(peer, read, _words(error))
            return
        read.in_flight.append(handle)
        self._in_flight += 1
        if state != "PROC":
            self._settle(peer, read, handle, state)

    def _descriptors(self, region: Region, offset: NDArray[np.int64], length: NDArray[np.int64]) -> Any:
        table = np.empty((len(length), 3), dtype=np.uint64)
        table[:, 0] = offset
        table[:, 0] += np.uint64(region.address)
        table[:, 1] = length
        table[:, 2] = max(region.device, 0)
        return self._nixl.get_xfer_descs(table, _memory_type(region))

    def _check(self, peer: _Peer, read: NixlRead) -> None:
        for handle in list(read.in_flight):
            try:
                state = self._nixl.check_xfer_state(handle)
            except Exception as error:
                self._settle(peer, read, handle, _words(error))
                continue
            if state != "PROC":
                self._settle(peer, read, handle, state)

    def _settle(self, peer: _Peer, read: NixlRead, handle: Any, state: str) -> None:
        """A piece ended: DONE, or with the words of an error."""
        read.in_flight.remove(handle)
        self._in_flight -= 1
        if state != "DONE":
            self._lose(peer, read, state)
        try:
            self._nixl.release_xfer_handle(handle)
        except Exception as error:
            log.warning("NIXL does not release a read from %s that ended: %s", peer.endpoint.agent, _words(error))

    def _lose(self, peer: _Peer, read: NixlRead, words: str) -> None:
        """A failed piece means a lost peer: UCX gives a connection up with its first error."""
        peer.lost = peer.lost or words
        for one in peer.reads:
            one.fail(f"read from {peer.endpoint.agent} failed: {words}")
        read.fail(f"read from {peer.endpoint.agent} failed: {words}")

    def _drop_ended(self, peer: _Peer) -> None:
        peer.reads = [read for read in peer.reads if read.state is ReadState.IN_PROGRESS]

    def _forget_if_left(self, peer: _Peer) -> None:
        self._drop_ended(peer)
        if not peer.leaving or peer.reads:
            return
        del self._peers[peer.endpoint.agent]
        try:
            self._nixl.remove_remote_agent(peer.endpoint.agent)
        except Exception as error:
            log.debug("NIXL has forgotten %s by itself: %s", peer.endpoint.agent, _words(error))

    def _registered(self) -> Region:
        if self._closed:
            raise TransferError("the transport is closed")
        if self._region is None:
            raise TransferError("no memory is registered yet")
        return self._region


def _import_nixl() -> Any:
    # Must be set before the import; without them NIXL announces itself on standard output.
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    os.environ.setdefault("UCX_LOG_LEVEL", "error")
    try:
        import nixl
    except ImportError as error:
        raise ConfigError(f"NIXL cannot be imported ({error}); install `nixl` or use `--connector tcp`") from error
    return nixl


def _new_agent(nixl: Any, name: str) -> Any:
    """A NIXL agent with UCX whose progress thread sleeps while there is nothing to do.

    `nixl_agent` fixes the delay of that thread at 0, with which it spins. So the agent underneath is made here, from
    the same bindings; where they have changed, the one that spins is used.
    """
    spinning = nixl.nixl_agent_config(backends=[_BACKEND])
    try:
        settings = nixl._bindings.nixlAgentConfig()
        settings.useProgThread = True
        settings.useListenThread = False
        settings.syncMode = nixl._bindings.NIXL_THREAD_SYNC_NONE
        settings.pthrDelay = PROGRESS_DELAY_MICROSECONDS
        settings.captureTelemetry = False
        agent = nixl.nixl_agent(name, nixl.nixl_agent_config(enable_prog_thread=False, backends=[]))
        agent.agent = nixl._bindings.nixlAgent(name, settings)
    except (AttributeError, TypeError) as error:
        log.warning("NIXL's progress thread cannot be told to sleep (%s); it will keep a core busy", error)
        return nixl.nixl_agent(name, spinning)
    if _BACKEND in agent.get_plugin_list():
        agent.create_backend(_BACKEND)
    return agent


def _memory_type(region: Region) -> str:
    return "DRAM" if region.device < 0 else "VRAM"


def _digest(metadata: bytes) -> bytes:
    return hashlib.blake2b(metadata, digest_size=_DIGEST_BYTES).digest()


def _checked_metadata(peer: RankEndpoint) -> bytes:
    """NIXL's own metadata. UCX trusts it, so a damaged one must not get there."""
    digest, metadata = peer.metadata[:_DIGEST_BYTES], peer.metadata[_DIGEST_BYTES:]
    if digest != _digest(metadata):
        raise TransferError(f"the metadata of {peer.agent} ({len(peer.metadata)} bytes) is not NIXL's or is damaged")
    return metadata


def _words(error: Exception) -> str:
    """NIXL's exceptions have no common base and an error code for text."""
    text = str(error) or type(error).__name__
    return text.removeprefix("NIXL_ERR_").replace("_", " ").lower() if text.startswith("NIXL_ERR_") else text


@dataclass(frozen=True, slots=True)
class NixlInstallation:
    """`plugins`: backends that NIXL can load here. `ucx_library`: the libucp that it uses, if found."""

    version: str
    plugins: list[str]
    ucx_library: str | None


def nixl_installation() -> NixlInstallation:
    """Start an agent and look at what was loaded. Raises ConfigError if NIXL is not installed or does not start."""
    nixl = _import_nixl()
    try:
        agent = _new_agent(nixl, f"doctor-{os.getpid()}")
        plugins = [str(name) for name in agent.get_plugin_list()]
    except Exception as error:
        raise ConfigError(f"NIXL does not start: {_words(error)}") from error
    with open("/proc/self/maps") as maps:
        libraries = {line.split()[-1] for line in maps if "/libucp" in line}
    try:
        version = importlib.metadata.version("nixl")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    return NixlInstallation(version, plugins, min(libraries, default=None))
