"""The process of one rank, from its start to its end."""

from __future__ import annotations

import functools
import logging
import signal
import time
from collections.abc import Callable

import zmq

from tandem import logs
from tandem.config import EngineConfig
from tandem.engine.io.leader_sockets import LeaderSockets
from tandem.engine.start.engine_map import EngineMap, exchange
from tandem.engine.start.leader import Leader
from tandem.engine.start.placement import RankPlacement
from tandem.engine.start.rank import Rank
from tandem.engine.start.rendezvous import meet
from tandem.engine.start.start_failure import StartFailureWatch
from tandem.engine.start.transfer_start import TransferStart
from tandem.engine.step.pipeline import Follower, follower_socket
from tandem.engine.step.runner import KvMemory, Runner, kv_blocks, kv_layout
from tandem.engine.step_commands import Shutdown
from tandem.engine.store import clone, first_line, open_store
from tandem.engine.timeouts import COLLECTIVE_SECONDS
from tandem.engine.world import SoloWorld, TorchWorld
from tandem.errors import StartError
from tandem.kv.layout import KvLayout
from tandem.models.decoder import Decoder
from tandem.models.kv_size import kv_block_bytes, kv_shape
from tandem.models.loader import load_decoder
from tandem.processes import end_child
from tandem.reports import Ended, Following, Loading, Ready, Reporter
from tandem.transfer.handshake import RankDescriptor
from tandem.transfer.identity import RankRecord, agree
from tandem.wire.messages import EngineStatus

log = logging.getLogger(__name__)


def run_rank(report: Reporter, name: str, config: EngineConfig, placement: RankPlacement) -> None:
    """Serve as one rank of an engine until the engine ends.

    Args:
        report: tells the launcher how the start goes, and of an end that it has not asked for.
        name: of the engine, for log lines.

    Raises:
        TandemError: the engine cannot start, or a rank was lost.
    """
    logs.set_up(name if config.parallel.world_size == 1 else f"{name} rank {placement.rank}", config.log_level)
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
            self._config.model.path, world.position, world.collectives, rank.dtype, rank.device, self._report_loading
        )
        memory, layout = self._allocate(world, decoder)
        runner = Runner(decoder, memory.tensor, self._config.cache.block_size, world)
        sockets = LeaderSockets.bind(rank.placement.host, rank.sockets, rank.key) if world.rank == 0 else None
        transfer = TransferStart(rank, agreement.identity, memory, self._end_process)
        record = agreement.records[world.rank]
        own = RankDescriptor(world.rank, record.tp_rank, record.pp_rank, record.host, layout, transfer.endpoint())
        engine = exchange(world, own, sockets.addresses if sockets else None)
        transfer.connect(engine)
        if sockets is None:
            return self._follow(runner, engine, end_start)
        return self._lead(Leader(rank, agreement, engine, sockets, runner, self._end_process), end_start)

    def _report_loading(self, loaded: int, total: int) -> None:
        self._report(Loading(loaded, total))

    def _allocate(self, world: SoloWorld | TorchWorld, decoder: Decoder) -> tuple[KvMemory, KvLayout]:
        """Allocate KV memory with as many blocks as the rank with the least room has."""
        rank, size = self._rank, self._config.cache.block_size
        block_bytes = kv_block_bytes(rank.model, world.position, size, rank.dtype)
        own = kv_blocks(block_bytes, self._config.cache.kv_memory, rank.device)
        blocks = min(int.from_bytes(data, "little") for data in world.all_gather(own.to_bytes(8, "little")))
        memory = KvMemory(kv_shape(rank.model, world.position, blocks, size), rank.dtype, rank.device)
        return memory, kv_layout(decoder, blocks, size)

    def _lead(self, leader: Leader, end_start: Callable[[], None]) -> str:
        def ready(status: EngineStatus) -> None:
            end_start()
            signal.signal(signal.SIGTERM, lambda *_: leader.mailbox.put(Shutdown("it was told to stop")))
            self._report(Ready(status))

        return leader.run(ready)

    def _follow(self, runner: Runner, engine: EngineMap, end_start: Callable[[], None]) -> str:
        end_start()
        if self._config.parallel.node_rank == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the leader gets one too, and ends its followers
        self._report(Following())
        address = engine.leader.step
        options = follower_socket(self._rank.placement.rank)
        return Follower(runner, self._rank.sockets.connect(zmq.DEALER, address.host, address.port, options)).run()
