"""The process of one rank, from its start to its end."""

from __future__ import annotations

import functools
import logging
import signal
import time
from collections.abc import Callable

from tandem import logs
from tandem.child_main import end_child
from tandem.config import EngineConfig
from tandem.engine.io.leader_sockets import FollowerSockets, LeaderSockets
from tandem.engine.start.engine_map import exchange
from tandem.engine.start.leader import Leader
from tandem.engine.start.placement import RankPlacement
from tandem.engine.start.rank import Rank
from tandem.engine.start.rendezvous import meet
from tandem.engine.start.start_failure import StartFailureWatch
from tandem.engine.start.transfer_start import TransferStart
from tandem.engine.step.pipeline import Follower
from tandem.engine.step.runner import KvMemory, Runner, kv_blocks
from tandem.engine.step_commands import Shutdown
from tandem.engine.store import clone, first_line, open_store
from tandem.engine.timeouts import COLLECTIVE_SECONDS
from tandem.engine.world import SoloWorld, TorchWorld
from tandem.errors import StartError
from tandem.kv.checksums import checksum_layout
from tandem.models.kv_cache import kv_layout
from tandem.models.loader import load_decoder
from tandem.reports import DRAIN_SIGNAL, Drained, Ended, Following, Loading, Ready, Reporter
from tandem.transfer.handshake import RankDescriptor
from tandem.transfer.identity import RankRecord, agree
from tandem.wire.engine_status import EngineStatus

log = logging.getLogger(__name__)


def run_rank(report: Reporter, config: EngineConfig, placement: RankPlacement) -> None:
    """Serve as one rank of an engine until the engine ends.

    Args:
        report: tells the launcher how the start goes, and of an end that it has not asked for.

    Raises:
        TandemError: the engine cannot start, or a rank was lost.
    """
    alone = config.parallel.world_size == 1
    logs.set_up(config.name if alone else f"{config.name} rank {placement.rank}", config.run.log_level)
    reason = RankProcess(report, Rank(config, placement)).run()
    if placement.rank != 0:
        report(Ended(f"the engine was ended on node 0: {reason}"))


class RankProcess:
    """One rank of an engine from meeting the others to the end.

    Until it serves, SIGTERM ends the process at once.
    """

    def __init__(self, report: Reporter, rank: Rank) -> None:
        self._report = report
        self._rank = rank
        self._config = rank.config
        # Called in other threads: when a rank has failed, the main thread may be waiting for it in a collective.
        self._end_process = functools.partial(end_child, report)

    def run(self) -> str:
        """Meet the other ranks and serve with them; return why the engine ended."""
        rank, parallel, timeout = self._rank, self._config.parallel, self._config.time.start_timeout
        record, meeting = rank.record(), rank.placement.meeting
        if meeting is None:
            return self._serve(SoloWorld(), record, end_start=lambda: None)
        started = time.monotonic()
        store = open_store(meeting, record.rank, timeout)
        meet(store, record, parallel.world_size, max(1.0, timeout - (time.monotonic() - started)))
        with StartFailureWatch(clone(store), record.rank, parallel.world_size, self._end_process) as watch:
            wait = max(COLLECTIVE_SECONDS, timeout)
            try:
                world = TorchWorld(store, record.rank, parallel, rank.device, rank.placement.host, wait)
            except RuntimeError as error:
                raise StartError(f"the ranks met but could not connect: {first_line(error)}") from None
            return self._serve(world, record, end_start=watch.end)

    def _serve(self, world: SoloWorld | TorchWorld, record: RankRecord, end_start: Callable[[], None]) -> str:
        """Agree, load, allocate, start the transfer thread, and run steps.

        Args:
            end_start: to be called when this rank can serve.
        """
        rank = self._rank
        try:
            agreement = agree(world, record)
        except StartError:
            end_start()  # every rank comes to this error by itself
            raise
        log.info("engine %s: rank %d of %d agreed", agreement.identity, world.rank, world.size)
        decoder = load_decoder(
            rank.placement.model.path, world.position, world.collectives, rank.dtype, rank.device, self._report_loading
        )
        fingerprint = self._fingerprint()  # before the next exchange, after which nobody waits long for another rank
        memory = self._allocate(world)
        runner = Runner(decoder, memory, world)
        leader = LeaderSockets.bind(rank.placement.host, rank.context, rank.key) if world.rank == 0 else None
        transfer = TransferStart(rank, agreement.identity, memory, self._end_process)
        record = agreement.records[world.rank]
        own = RankDescriptor(
            world.rank,
            record.tp_rank,
            record.pp_rank,
            record.host,
            memory.layout,
            transfer.endpoint(),
            memory.checksums.offset if memory.checksums else None,
        )
        try:
            engine = exchange(world, own, leader.addresses if leader else None, fingerprint)
        except StartError:
            end_start()  # every rank comes to this error by itself
            raise
        if leader is None:
            sockets = FollowerSockets(world.rank, rank.context, rank.key, engine.leader)
            transfer.connect(engine, sockets.connect_transfer_thread)
            return self._follow(runner, sockets, end_start)
        transfer.connect(engine, leader.connect_transfer_thread)
        return self._lead(Leader(rank, agreement, engine, leader, runner, self._end_process), end_start)

    def _report_loading(self, loaded: int, total: int) -> None:
        self._report(Loading(loaded, total))

    def _fingerprint(self) -> str | None:
        """Return the fingerprint of the model, on the first rank of a node. Raises ModelError."""
        future = self._rank.fingerprint
        if future is not None and not future.done():
            log.info("the model is loaded; the rest of its weights is being read for the fingerprint")
        return None if future is None else future.result()

    def _allocate(self, world: SoloWorld | TorchWorld) -> KvMemory:
        """Allocate KV memory with as many blocks as the rank with the least room has."""
        rank, cache = self._rank, self._config.cache
        block = kv_layout(rank.model, world.position, 1, cache.block_size, rank.dtype)
        block_bytes = block.nbytes + (checksum_layout(block).nbytes if cache.verify_kv else 0)
        own = kv_blocks(block_bytes, cache.kv_memory, rank.device)
        blocks = min(int.from_bytes(data, "little") for data in world.all_gather(own.to_bytes(8, "little")))
        layout = kv_layout(rank.model, world.position, blocks, cache.block_size, rank.dtype)
        return KvMemory(layout, rank.dtype, rank.device, verify=cache.verify_kv)

    def _lead(self, leader: Leader, end_start: Callable[[], None]) -> str:
        def ready(status: EngineStatus) -> None:
            end_start()
            signal.signal(signal.SIGTERM, lambda *_: leader.mailbox.put(Shutdown("it was told to stop")))
            signal.signal(DRAIN_SIGNAL, lambda *_: leader.drain())
            self._report(Ready(status))

        reason = leader.run(ready)
        if leader.drains:
            self._report(Drained(f"{self._config.name} has drained and ended: {reason}"))
        return reason

    def _follow(self, runner: Runner, sockets: FollowerSockets, end_start: Callable[[], None]) -> str:
        end_start()
        if self._config.parallel.node_rank == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the leader gets one too, and ends its followers
        self._report(Following())
        return Follower(runner, sockets.connect_step()).run()
