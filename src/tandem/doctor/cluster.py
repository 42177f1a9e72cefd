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
from tandem.config import EngineConfig
from tandem.doctor.links import Link, NodeInfo, NodeMemory, key_difference
from tandem.doctor.ping import PingServer, ping_all
from tandem.doctor.reads import BULK_BYTES, ProbeMemory, ReadProbe, measure_all
from tandem.doctor.store_exchange import StoreExchange
from tandem.engine.start.launch import published_host
from tandem.engine.start.rendezvous import meet
from tandem.engine.step.runner import pick_device
from tandem.engine.store import Store, first_line, open_store, subspace
from tandem.engine.world import TorchWorld
from tandem.errors import ConfigError, EngineFailed, StartError, TandemError
from tandem.ids import new_identity
from tandem.transfer.handshake import PROTOCOL
from tandem.transfer.identity import RankRecord, agree
from tandem.transfer.transports.registry import connector_name, transport_factory
from tandem.wire.addresses import interface_of
from tandem.wire.keys import load_key

COLLECTIVE_SECONDS = 60.0
"""Longest that the slowest node may take for the step before a collective; starting a transport takes longest."""
EXCHANGE_SECONDS = 30.0
REDUCED_BYTES = 1 << 20
REDUCTIONS = 10
NONE = "none (doctor)"


@dataclass(frozen=True, slots=True)
class ClusterReport:
    """The result of the check, the same on every node.

    Attributes:
        errors: by node, why it could take no part in the reads.
        all_reduce: seconds for a sum of REDUCED_BYTES over all nodes; the median.
        clocks: the wall clocks of the nodes at one moment, give or take one collective; seconds.
    """

    nodes: list[NodeInfo]
    links: list[Link]
    errors: dict[int, str]
    all_reduce: float | None = None
    clocks: list[float] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not self.errors and key_difference(self.nodes) is None and all(link.error is None for link in self.links)


class ClusterCheck:
    """The check on one node.

    Args:
        config: of the engine that would span the nodes; its model is not looked at.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._parallel = config.parallel
        self.own = config.parallel.node_rank
        self.connector = connector_name(config.network.connector)
        self._host = published_host(config)
        self._device = pick_device(config.model.device, 0)
        self._key = load_key(config.access.cluster_key_file)

    def run(self, log: Callable[[str], None]) -> ClusterReport:
        """Meet, ping, agree, read. Raises TandemError, as an engine would, where the nodes do not come together.

        Args:
            log: takes lines about how it goes.
        """
        own, nodes = self.own, self._parallel.nnodes
        log(f"node {own} of {nodes} at {self._host}: waiting for the others at {self._parallel.master}")
        record = self._record()
        store = self._meet(record)
        exchange = StoreExchange(subspace(store, "doctor"), own, nodes)
        log(f"node {own}: {nodes} nodes met")
        report = self._ping_all(exchange)
        if not report.good:
            exchange.finish()
            return report
        world = self._join(store)
        try:
            agree(world, record)
            log(f"node {own}: {nodes} nodes agree")
            report = replace(report, all_reduce=self._all_reduce_seconds(world), clocks=_clocks(world))
            return self._read_all(report, exchange, world)
        except (EngineFailed, RuntimeError) as error:
            raise StartError(f"a node was lost during the check: {first_line(error)}") from None
        finally:
            world.close()

    def _meet(self, record: RankRecord) -> Store:
        timeout, master = self._config.time.start_timeout, self._parallel.master
        assert master is not None
        deadline = time.monotonic() + timeout
        store = open_store(master, self.own, timeout)
        meet(store, record, self._parallel.nnodes, max(1.0, deadline - time.monotonic()))
        return store

    def _record(self) -> RankRecord:
        parallel, engine_id = self._parallel, self._config.engine_id
        return RankRecord(
            rank=self.own,
            tp_rank=0,
            pp_rank=0,
            node_rank=self.own,
            host=f"{socket.gethostname()} {self._host}",
            pid=os.getpid(),
            engine_id=engine_id,
            model=NONE,
            model_files=NONE,
            dtype="none",
            device=self._config.model.device,
            tp=parallel.tp,
            pp=parallel.pp,
            nnodes=parallel.nnodes,
            block_size=0,
            max_model_len=0,
            connector=self.connector,
            protocol=PROTOCOL,
            version=__version__,
            identity=new_identity(engine_id) if self.own == 0 else None,
        )

    def _ping_all(self, exchange: StoreExchange) -> ClusterReport:
        """Ping between all pairs; the same result on all nodes."""
        key, server = self._key, None
        here = NodeInfo(self.own, self._host, interface_of(self._host), _machine(), key.fingerprint if key else None)
        with contextlib.ExitStack() as stack:
            try:
                server = PingServer(self._host, key)
                stack.callback(server.close)
                here = msgspec.structs.replace(here, port=server.port)
            except ConfigError as error:
                here = msgspec.structs.replace(here, error=str(error))
            nodes = exchange.gather("nodes", here, NodeInfo, EXCHANGE_SECONDS)
            links = ping_all(server, here, nodes)
            gathered = exchange.gather("pings", links, list[Link], EXCHANGE_SECONDS)
        errors = {node.number: node.error for node in nodes if node.error is not None}
        return ClusterReport(nodes, [link for links in gathered for link in links], errors)

    def _join(self, store: Store) -> TorchWorld:
        one_rank_each = replace(self._parallel, tp=self._parallel.nnodes, pp=1)
        try:
            return TorchWorld(store, self.own, one_rank_each, self._device, self._host, COLLECTIVE_SECONDS)
        except RuntimeError as error:
            raise StartError(
                f"the nodes reach each other, but torch.distributed does not connect: {first_line(error)}; it uses"
                f" {interface_of(self._host) or self._host}: unset GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, or set"
                " --host"
            ) from None

    def _all_reduce_seconds(self, world: TorchWorld) -> float:
        """Return how long tensor parallelism over these nodes waits, several times a layer."""
        data = torch.ones(REDUCED_BYTES // 4, dtype=torch.float32, device=self._device)
        seconds = []
        for _ in range(REDUCTIONS):
            started = time.monotonic()
            world.collectives.all_reduce(data.fill_(1.0))
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            seconds.append(time.monotonic() - started)
        return statistics.median(seconds)

    def _read_all(self, report: ClusterReport, exchange: StoreExchange, world: TorchWorld) -> ClusterReport:
        """Return `report` with what reads over all links show; the same on all nodes."""
        probe = None
        with contextlib.ExitStack() as stack:
            try:
                agent = f"doctor-{self.own}-{uuid.uuid4().hex[:8]}"
                transport = transport_factory(self.connector, self._key)(agent, self._host)
                stack.callback(transport.close)
                probe = ReadProbe(transport, ProbeMemory(BULK_BYTES, self.own, self._device))
                memory = NodeMemory(self.own, transport.describe())
            except (TandemError, RuntimeError) as error:
                probe, memory = None, NodeMemory(self.own, error=str(error))
            gathered = world.all_gather(msgspec.msgpack.encode(memory))
            memories = [msgspec.msgpack.decode(data, type=NodeMemory) for data in gathered]
            links = measure_all(probe, memories, report.links, exchange)
            exchange.finish()
        return replace(report, links=links, errors={m.node: m.error for m in memories if m.error is not None})


def _clocks(world: TorchWorld) -> list[float]:
    world.all_gather(b"now")
    return [struct.unpack("d", data)[0] for data in world.all_gather(struct.pack("d", time.time()))]


def _machine() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
