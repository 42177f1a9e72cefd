"""The life of one rank, from meeting the others to its end. Runs as a process of its own."""

from __future__ import annotations

import logging
import socket as hosts
import time
from collections.abc import Callable

import msgspec
import zmq

from tandem.config import EngineConfig
from tandem.engine.commands import Command
from tandem.engine.mailbox import Mailbox
from tandem.engine.start.leading import Leading
from tandem.engine.start.moving import Moving
from tandem.engine.start.place import RankPlace
from tandem.engine.start.rank import Published, Rank
from tandem.engine.start.rendezvous import StartFailureWatch, meet, open_store
from tandem.engine.step.pipeline import Follower, follower_socket
from tandem.engine.step.runner import KvMemory, Runner, kv_blocks
from tandem.engine.world import SoloWorld, TorchWorld
from tandem.errors import EngineFailed, StartError, TandemError
from tandem.kv.layout import KvLayout
from tandem.models.kv_cache import kv_layout
from tandem.models.loader import load_decoder
from tandem.transfer.handshake import RankDescriptor
from tandem.transfer.identity import Agreement, RankRecord, agree
from tandem.transfer.transports.base import RankEndpoint
from tandem.wire.messages import EngineStatus

log = logging.getLogger(__name__)

COLLECTIVE_SECONDS = 60.0
CAUSE_SECONDS = 2.0


def run_rank(
    config: EngineConfig,
    place: RankPlace,
    on_progress: Callable[[int, int], None],
    on_ready: Callable[[EngineStatus], None],
    on_mailbox: Callable[[Mailbox[Command]], None],
    on_following: Callable[[], None],
    end_process: Callable[[str], None],
) -> str:
    """Serve until stopped; returns why it ended.

    Args:
        on_progress: bytes of weights loaded so far, and in all.
        on_ready: called on rank 0 once the engine can serve.
        on_mailbox: hands out the leader's mailbox, so that a signal handler can put a Shutdown in it.
        on_following: called on the other ranks once they take their orders from rank 0.
        end_process: ends this process, with the reason. Called in other threads, when another rank has failed and
            the main thread may be waiting for it.

    Raises:
        TandemError: the engine cannot start, or a rank was lost.
    """
    life = _Life(Rank(config, place), end_process)
    try:
        return life.run(on_progress, on_ready, on_mailbox, on_following)
    except Exception as error:
        life.tell_others(error)
        raise


class _Life:
    """
    Args:
        end_process: another rank has failed while the engine started, and said why.
    """

    def __init__(self, rank: Rank, end_process: Callable[[str], None]) -> None:
        self.rank = rank
        self._end_process = end_process
        self._fate: StartFailureWatch | None = None

    def run(
        self,
        on_progress: Callable[[int, int], None],
        on_ready: Callable[[EngineStatus], None],
        on_mailbox: Callable[[Mailbox[Command]], None],
        on_following: Callable[[], None],
    ) -> str:
        record = self.rank.record()
        world = self._meet(record)
        try:
            agreement = agree(world, record)
        except StartError:
            self._end_start()  # every rank has come to this error by itself
            raise
        log.info("engine %s: rank %d of %d agreed", agreement.identity, world.rank, world.size)
        decoder = load_decoder(
            self.rank.place.model.path,
            world.position,
            world.collectives,
            self.rank.dtype,
            self.rank.device,
            on_progress,
        )
        memory = self._allocate(world)
        runner = Runner(decoder, memory, world)
        leading = Leading(self.rank, agreement, self._end_process) if world.rank == 0 else None
        transport = Moving(self.rank, agreement.identity, memory, self._end_process)
        published = self._exchange(world, agreement, memory.layout, transport.endpoint(), leading)
        transport.connect(published)
        if leading is None:
            self._end_start()
            on_following()
            return self._follow(runner, published)

        def ready(status: EngineStatus) -> None:
            self._end_start()
            on_ready(status)

        return leading.run(runner, world, published, ready, on_mailbox)

    def tell_others(self, error: Exception) -> None:
        """While the engine starts: this rank has failed, and the others need not wait for it."""
        if self._fate is None:
            return
        if isinstance(error, EngineFailed):
            # A collective with a rank that has gone. If that one said why, it ends this process meanwhile.
            time.sleep(CAUSE_SECONDS)
        text = str(error) if isinstance(error, TandemError) else f"{type(error).__name__}: {error}"
        rank = self.rank.place.rank
        self._fate.fail(f"rank {rank} on {hosts.gethostname()}: {text}", serves_store=rank == 0)

    def _end_start(self) -> None:
        if self._fate is not None:
            self._fate.end()
            self._fate = None

    def _meet(self, record: RankRecord) -> SoloWorld | TorchWorld:
        parallel, timeout = self.rank.config.parallel, self.rank.config.time.start_timeout
        if parallel.world_size == 1:
            return SoloWorld()
        master = parallel.master if parallel.nnodes > 1 else None
        started = time.monotonic()
        store = open_store(master, self.rank.place.meeting_file, record.rank, timeout)
        left = max(1.0, timeout - (time.monotonic() - started))
        meet(store, record, parallel.world_size, left)
        self._fate = StartFailureWatch(store.clone(), parallel.world_size - 1, self._end_process)
        try:
            return TorchWorld(
                store, record.rank, parallel, self.rank.device, self.rank.place.host, max(COLLECTIVE_SECONDS, timeout)
            )
        except RuntimeError as error:
            raise StartError(f"the ranks met but could not connect: {str(error).splitlines()[0]}") from None

    def _allocate(self, world: SoloWorld | TorchWorld) -> KvMemory:
        """Allocate KV memory with as many blocks as the rank with the least room has."""
        model, dtype, cache = self.rank.model, self.rank.dtype, self.rank.config.cache
        block_bytes = kv_layout(model, world.position, 1, cache.block_size, dtype).nbytes
        own = kv_blocks(block_bytes, cache.kv_memory, self.rank.device)
        blocks = min(int.from_bytes(data, "little") for data in world.all_gather(own.to_bytes(8, "little")))
        return KvMemory(kv_layout(model, world.position, blocks, cache.block_size, dtype), dtype, self.rank.device)

    def _exchange(
        self,
        world: SoloWorld | TorchWorld,
        agreement: Agreement,
        layout: KvLayout,
        endpoint: RankEndpoint,
        leading: Leading | None,
    ) -> list[Published]:
        """Everybody's memory and the leader's addresses, to all ranks, over the world group."""
        record = agreement.records[world.rank]
        own = Published(
            RankDescriptor(world.rank, record.tp_rank, record.pp_rank, record.host, layout, endpoint),
            leading.step_address if leading else None,
            leading.transfer_address if leading else None,
        )
        gathered = world.all_gather(msgspec.msgpack.encode(own))
        return [msgspec.msgpack.decode(data, type=Published) for data in gathered]

    def _follow(self, runner: Runner, published: list[Published]) -> str:
        address = published[0].step_address
        assert address is not None
        options = follower_socket(self.rank.place.rank)
        socket = self.rank.sockets.connect(zmq.DEALER, address.host, address.port, options)
        return Follower(runner, socket).run()
