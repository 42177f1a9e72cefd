"""One-sided reads between the memories of ranks: a `Transport` whose reads take their time and may end in any way.

A read is cut into pieces. Each is looked at in the source at one moment and lands in the destination at a later one,
whatever the processes on both sides do meanwhile. What lands is garbage if nobody protected the source block at that
moment: there, another request's bytes could have been.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tandem.errors import PeerLost, TransferError
from tandem.kv.blocks import BlockPool
from tandem.kv.runs import Runs
from tandem.transfer.transports.base import RankEndpoint, ReadState, Region
from tests.simulator.model import ITEM, TAKEN, Memory
from tests.simulator.network import Network
from tests.simulator.world import Process, World

TEARDOWN_SECONDS = 1.0
"""After a disconnect, bytes of a read that has not ended may arrive for so long."""
UNREACHABLE_SECONDS = 4.0
RETRY_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class ReadProfile:
    """How reads end.

    Attributes:
        one_sided: bytes move though the processes stand still, as with RDMA; else both processes move them.
        own_network: bytes take other cables than messages do, which are not cut with those.
        slow: probability of a read that takes longer than leases do.
        failing: probability of FAILED, and again of FAILING.
        hanging: probability of a read that never ends by itself.
    """

    one_sided: bool
    own_network: bool
    slow: float
    failing: float
    hanging: float


class Owner(Protocol):
    """The engine that a memory belongs to."""

    process: Process
    pool: BlockPool

    def may_be_written(self, block: int) -> bool:
        """Return whether a read may write into the block now."""


@dataclass(slots=True, eq=False)
class Place:
    """A rank's memory where everyone can find it, by the name of its agent."""

    owner: Owner
    memory: Memory


@dataclass(slots=True, eq=False)
class SimRead:
    """A read; its `pieces` are (source cell, destination cell, cells) and have not landed yet."""

    agent: str
    pieces: list[tuple[int, int, int]]
    state: ReadState = ReadState.IN_PROGRESS
    error: str | None = None
    to_land: int = 0
    cancelled: bool = False


@dataclass(slots=True)
class Fabric:
    """What all transports share."""

    world: World
    network: Network
    profile: ReadProfile
    lease_ttl: float
    places: dict[str, Place] = field(default_factory=dict)


class SimTransport:
    """See `tandem.transfer.transports.base.Transport`.

    Args:
        wake: called when `poll` would be worth while.
    """

    def __init__(self, agent: str, place: Place, fabric: Fabric, wake: Callable[[], None]) -> None:
        self._agent = agent
        self._own = place
        self._fabric = fabric
        self._world = fabric.world
        self._wake = wake
        self._reads: list[SimRead] = []
        self.connected: set[str] = set()
        fabric.places[agent] = place

    def register(self, region: Region) -> None:
        """The memory is known already."""

    def describe(self) -> RankEndpoint:
        return RankEndpoint(self._agent, b"", Region(0, len(self._own.memory.cells) * ITEM))

    def connect(self, peer: RankEndpoint) -> None:
        place = self._fabric.places.get(peer.agent)
        if place is None or (place.owner.process.dead and self._world.chance(0.5)):
            raise TransferError(f"{peer.agent} is not there")
        self.connected.add(peer.agent)

    def disconnect(self, agent: str) -> None:
        self.connected.discard(agent)
        for read in [read for read in self._reads if read.agent == agent]:
            if self._fabric.profile.one_sided:
                wait = self._world.random.random() * TEARDOWN_SECONDS
                self._world.after(wait, lambda r=read: self._fail(r, "disconnected"))  # type: ignore[misc]
            else:
                self._fail(read, "disconnected")

    def post(self, agent: str, runs: Runs) -> SimRead:
        if agent not in self.connected:
            raise TransferError(f"{agent} is not connected")
        if self._fabric.places[agent].owner.process.dead and self._world.chance(0.5):
            raise PeerLost(f"{agent} is lost")
        triples = zip(runs.src_offset.tolist(), runs.dst_offset.tolist(), runs.length.tolist(), strict=True)
        read = SimRead(agent, [(s // ITEM, d // ITEM, n // ITEM) for s, d, n in triples if n])
        read.to_land = len(read.pieces)
        self._reads.append(read)
        self._start(read)
        return read

    def poll(self) -> None:
        """Reads go on by themselves."""

    def wait_on(self) -> Sequence[Any]:
        return []

    def close(self) -> None:
        for agent in list(self.connected):
            self.disconnect(agent)

    @property
    def quiet(self) -> bool:
        """Whether no byte can land any more."""
        return not self._reads

    # --- a read goes on ------------------------------------------------------------------------------------------

    def _start(self, read: SimRead) -> None:
        world, profile = self._world, self._fabric.profile
        seconds = world.wait(0.0001, 0.05)
        if world.chance(profile.slow):
            seconds = world.random.uniform(0.2, 3.0) * self._fabric.lease_ttl
        if not read.pieces:
            self._done(read)
            return
        for piece in read.pieces:
            if world.chance(profile.hanging):
                continue
            looked = world.random.random() * seconds
            world.after(looked, lambda p=piece, s=seconds - looked: self._look(read, p, s))  # type: ignore[misc]
        if world.chance(profile.failing):
            world.after(world.random.random() * seconds, lambda: self._fail(read, "an error of the fabric"))
        elif profile.one_sided and world.chance(profile.failing):
            world.after(world.random.random() * seconds, lambda: self._failing(read))

    def _look(self, read: SimRead, piece: tuple[int, int, int], most: float, waited: float = 0.0) -> None:
        """Take a piece out of the source's memory; it is under way from now on."""
        if read.cancelled:
            return
        source, world = self._fabric.places[read.agent], self._world
        own, their = self._own.owner.process, source.owner.process
        if their.dead:
            world.after(world.wait(0.001, 2.0), lambda: self._fail(read, "the peer is gone"))
            return
        stopped = not self._fabric.profile.one_sided and their.paused
        cut = not self._fabric.profile.own_network and self._fabric.network.is_cut(own, their)
        if stopped or cut:
            if waited > UNREACHABLE_SECONDS and not stopped:
                self._fail(read, "the peer cannot be reached")
            else:
                world.after(RETRY_SECONDS, lambda: self._look(read, piece, most, waited + RETRY_SECONDS))
            return
        block = piece[0] // source.memory.block
        content = source.memory.cells[piece[0] : piece[0] + piece[2]]
        first, last = block, (piece[0] + piece[2] - 1) // source.memory.block
        if not all(source.owner.pool.references(one) for one in range(first, last + 1)):
            content = [TAKEN] * piece[2]
        process = None if self._fabric.profile.one_sided else own
        world.after(world.random.random() * most, lambda: self._land(read, piece, content), process)

    def _land(self, read: SimRead, piece: tuple[int, int, int], content: list[int]) -> None:
        if read.cancelled or self._own.owner.process.dead:
            return
        memory = self._own.memory
        for block in range(piece[1] // memory.block, (piece[1] + piece[2] - 1) // memory.block + 1):
            if not self._own.owner.may_be_written(block):
                self._world.fail(
                    f"{self._agent}: bytes of a read arrive in block {block}, which is not its own any more"
                )
        memory.cells[piece[1] : piece[1] + piece[2]] = content
        read.to_land -= 1
        if not read.to_land and read.state is ReadState.IN_PROGRESS:
            self._done(read)

    def _done(self, read: SimRead) -> None:
        read.state = ReadState.DONE
        self._reads.remove(read)
        self._wake()

    def _failing(self, read: SimRead) -> None:
        """It failed, and yet its bytes go on arriving for a while, or until the peer is disconnected."""
        if read.state is not ReadState.IN_PROGRESS:
            return
        read.state, read.error = ReadState.FAILING, "an error, with other parts under way"
        self._wake()
        if self._world.chance(0.5):
            self._world.after(self._world.wait(0.01, 3.0), lambda: self._fail(read, "at last"))

    def _fail(self, read: SimRead, error: str) -> None:
        if read.cancelled or read.state is ReadState.DONE:
            return
        read.cancelled = True
        read.state, read.error = ReadState.FAILED, read.error or error
        self._reads.remove(read)
        self._wake()
