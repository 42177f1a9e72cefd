"""A check of the nodes of an engine: they meet and agree exactly as an engine's ranks do, then read from each other.

One process per node takes part, whatever tp and pp are; those are only compared.
"""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import struct
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import torch

from tandem import __version__
from tandem.config import (
    Device,
    EngineConfig,
    ModelSection,
    NetworkSection,
    ParallelSection,
    TimeSection,
)
from tandem.config_access import AccessSection
from tandem.doctor.board import Board
from tandem.doctor.cluster_messages import NodeDoor, NodeMemory, Pinged, Reach
from tandem.doctor.door import Door, knock
from tandem.doctor.reads import BULK_BYTES, Node, all_pairs
from tandem.doctor.slab import Slab
from tandem.engine.start.launch import published_host
from tandem.engine.start.rendezvous import meet
from tandem.engine.step.runner import pick_device
from tandem.engine.store import Store, open_store, subspace
from tandem.engine.world import TorchWorld
from tandem.errors import ConfigError, EngineFailed, StartError, TandemError
from tandem.ids import new_identity
from tandem.transfer.handshake import PROTOCOL
from tandem.transfer.identity import RankRecord, agree
from tandem.transfer.transports.registry import transport_factory
from tandem.wire.addresses import interface_of
from tandem.wire.keys import ClusterKey, load_key

COLLECTIVE_SECONDS = 60.0
"""What the slowest node may take for the step before a collective; starting a transport takes longest."""
EXCHANGE_SECONDS = 30.0
REDUCED_BYTES = 1 << 20
REDUCTIONS = 10
NONE = "none (doctor)"


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    """As the flags of `tandem engine` of the same names."""

    parallel: ParallelSection
    connector: str
    engine_id: str | None = None
    host: str | None = None
    cluster_key_file: Path | None = None
    start_timeout: float = 120.0
    device: Device = "auto"

    def engine_config(self) -> EngineConfig:
        return EngineConfig(
            role="mixed",
            model=ModelSection(device=self.device),
            engine_id=self.engine_id,
            parallel=self.parallel,
            network=NetworkSection(self.connector, host=self.host),
            access=AccessSection(cluster_key_file=self.cluster_key_file),
            time=TimeSection(self.start_timeout),
        )


@dataclass(frozen=True, slots=True)
class ClusterResult:
    """What every node knows in the end.

    Attributes:
        own: number of this node.
        errors: by node, why it could take no part in the reads.
        keys_differ: which nodes have which cluster key, where not all have the same.
        all_reduce: seconds for a sum of REDUCED_BYTES over all nodes; the median.
        clocks: the wall clocks of the nodes at one moment, give or take one collective; seconds.
    """

    own: int
    nodes: list[NodeDoor]
    reach: list[Reach]
    errors: dict[int, str]
    keys_differ: str | None
    all_reduce: float | None = None
    clocks: list[float] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not self.errors and self.keys_differ is None and all(result.error is None for result in self.reach)


def check_cluster(plan: ClusterPlan, say: Callable[[str], None]) -> ClusterResult:
    """Meet, knock, agree, read. Raises TandemError, as an engine would, where the nodes do not come together.

    Args:
        say: takes lines about how it goes.
    """
    host = published_host(plan.engine_config())
    device = pick_device(plan.device, 0)
    key = load_key(plan.cluster_key_file)
    own, nodes = plan.parallel.node_rank, plan.parallel.nnodes
    say(f"node {own} of {nodes} at {host}: waiting for the others at {plan.parallel.master}")
    record = _record(plan, host)
    board, store = _meet(plan, record)
    say(f"node {own}: {nodes} nodes met")
    result = _knock_at_all(board, own, host, key)
    if not result.good:
        board.part()
        return result
    world = _join(plan, store, host, device)
    try:
        agree(world, record)
        say(f"node {own}: {nodes} nodes agree")
        result = replace(result, all_reduce=_all_reduce_seconds(world, device), clocks=_clocks(world))
        return _read_all(plan, result, board, world, device, key)
    except (EngineFailed, RuntimeError) as error:
        raise StartError(f"a node was lost during the check: {str(error).splitlines()[0][:200]}") from None
    finally:
        world.close()


def _meet(plan: ClusterPlan, record: RankRecord) -> tuple[Board, Store]:
    parallel, timeout = plan.parallel, plan.start_timeout
    started = time.monotonic()
    assert parallel.master is not None
    store = open_store(parallel.master, record.rank, timeout)
    meet(store, record, parallel.nnodes, max(1.0, timeout - (time.monotonic() - started)))
    return Board(subspace(store, "doctor"), record.rank, parallel.nnodes), store


def _knock_at_all(board: Board, own: int, host: str, key: ClusterKey | None) -> ClusterResult:
    """Pings between all pairs; the same result on all nodes."""
    digest = key.fingerprint if key else None
    here = NodeDoor(own, host, interface_of(host), _machine(), digest)
    door = None
    try:
        door = Door(host, key)
        here = msgspec.structs.replace(here, port=door.port)
    except ConfigError as error:
        here = msgspec.structs.replace(here, error=str(error))
    try:
        doors = board.exchange("doors", here, EXCHANGE_SECONDS)
        found = knock(door, own, doors) if door else [_mute(here, other) for other in doors if other.node != own]
        pinged = board.exchange("pings", Pinged(found), EXCHANGE_SECONDS)
    finally:
        if door is not None:
            door.close()
    errors = {other.node: other.error for other in doors if other.error is not None}
    return ClusterResult(own, doors, [reach for one in pinged for reach in one.reach], errors, _key_difference(doors))


def _mute(here: NodeDoor, other: NodeDoor) -> Reach:
    return Reach(here.node, other.node, error=f"{here} does not listen", step="start")


def _join(plan: ClusterPlan, store: Store, host: str, device: torch.device) -> TorchWorld:
    parallel = plan.parallel
    one_each = ParallelSection(parallel.nnodes, 1, parallel.nnodes, parallel.node_rank, parallel.master)
    try:
        return TorchWorld(store, parallel.node_rank, one_each, device, host, COLLECTIVE_SECONDS)
    except RuntimeError as error:
        raise StartError(
            f"the nodes reach each other, but torch.distributed does not connect: {str(error).splitlines()[0][:200]};"
            f" it uses {interface_of(host) or host}: unset GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, or set --host"
        ) from None


def _record(plan: ClusterPlan, host: str) -> RankRecord:
    parallel = plan.parallel
    return RankRecord(
        rank=parallel.node_rank,
        tp_rank=0,
        pp_rank=0,
        node_rank=parallel.node_rank,
        host=f"{socket.gethostname()} {host}",
        pid=os.getpid(),
        engine_id=plan.engine_id,
        model=NONE,
        fingerprint=NONE,
        dtype="none",
        device=plan.device,
        tp=parallel.tp,
        pp=parallel.pp,
        nnodes=parallel.nnodes,
        block_size=0,
        max_model_len=0,
        connector=plan.connector,
        protocol=PROTOCOL,
        version=__version__,
        identity=new_identity(plan.engine_id) if parallel.node_rank == 0 else None,
    )


def _all_reduce_seconds(world: TorchWorld, device: torch.device) -> float:
    """What tensor parallelism over these nodes waits for, several times a layer."""
    data = torch.ones(REDUCED_BYTES // 4, dtype=torch.float32, device=device)
    seconds = []
    for _ in range(REDUCTIONS):
        started = time.monotonic()
        world.collectives.all_reduce(data.fill_(1.0))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.monotonic() - started)
    return statistics.median(seconds)


def _clocks(world: TorchWorld) -> list[float]:
    world.all_gather(b"now")
    return [struct.unpack("d", data)[0] for data in world.all_gather(struct.pack("d", time.time()))]


def _read_all(
    plan: ClusterPlan,
    result: ClusterResult,
    board: Board,
    world: TorchWorld,
    device: torch.device,
    key: ClusterKey | None,
) -> ClusterResult:
    own = result.own
    with contextlib.ExitStack() as stack:
        node, memory = _prepare(plan, result.nodes[own], device, key, stack)
        gathered = world.all_gather(msgspec.msgpack.encode(memory))
        memories = [msgspec.msgpack.decode(data, type=NodeMemory) for data in gathered]
        reach = all_pairs(node, own, memories, result.reach, board)
        board.part()
    return replace(result, reach=reach, errors={m.node: m.error for m in memories if m.error is not None})


def _prepare(
    plan: ClusterPlan, here: NodeDoor, device: torch.device, key: ClusterKey | None, stack: contextlib.ExitStack
) -> tuple[Node | None, NodeMemory]:
    """This node ready to be read from, or with an error for all others to see; `stack` closes it."""
    try:
        agent = f"doctor-{here.node}-{uuid.uuid4().hex[:8]}"
        transport = transport_factory(plan.connector, key)(agent, here.host)
        stack.callback(transport.close)
        slab = Slab(BULK_BYTES, here.node, device)
        transport.register(slab.region)
        return Node(transport, slab), NodeMemory(here.node, transport.describe())
    except (TandemError, RuntimeError) as error:
        return None, NodeMemory(here.node, error=str(error))


def _machine() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _key_difference(nodes: list[NodeDoor]) -> str | None:
    if len({node.key for node in nodes}) == 1:
        return None
    return ", ".join(f"{node} has {f'key {node.key}' if node.key else 'none'}" for node in nodes)
