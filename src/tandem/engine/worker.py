"""One rank of an engine, from its first moment to its last. Runs as a process of its own."""

from __future__ import annotations

import logging
import os
import socket as hosts
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
import zmq
import zmq.asyncio

from tandem import __version__
from tandem.config import EngineConfig
from tandem.engine.commands import Command
from tandem.engine.leader import Leader
from tandem.engine.mailbox import Mailbox
from tandem.engine.pipeline import Follower, LeaderPipeline, SoloPipeline
from tandem.engine.place import RankPlace
from tandem.engine.rendezvous import SharedFate, meet, open_store
from tandem.engine.runner import KvMemory, Runner, kv_blocks, kv_layout, pick_device
from tandem.engine.switchboard import Switchboard, Wiring
from tandem.engine.world import SoloWorld, TorchWorld
from tandem.errors import StartError, TandemError
from tandem.ids import new_identity
from tandem.kv.blocks import BlockPool
from tandem.kv.layout import KvLayout
from tandem.models.config import ModelConfig, load_config
from tandem.models.decoder import Decoder
from tandem.models.fingerprint import fingerprint
from tandem.models.kv_size import kv_block_bytes, kv_shape
from tandem.models.loader import load_decoder
from tandem.scheduling.admission import Limits
from tandem.scheduling.scheduler import Scheduler
from tandem.transfer.base import RankEndpoint
from tandem.transfer.handshake import PROTOCOL, EngineDescriptor, RankDescriptor
from tandem.transfer.identity import Agreement, RankRecord, agree
from tandem.transfer.mover import Mover, start_mover
from tandem.transfer.transports import transport_factory
from tandem.wire.keys import load_key
from tandem.wire.messages import Address, EngineStatus, KvTransferParams, Register
from tandem.wire.peer_messages import Envelope
from tandem.wire.sockets import SocketOptions, Sockets

log = logging.getLogger(__name__)

TRANSFER_START_SECONDS = 60.0
COLLECTIVE_SECONDS = 300.0
LAST_WORD_SECONDS = 2.0


class _Published(msgspec.Struct, frozen=True):
    """What every rank tells all others once its memory and transport are there. Sockets: the leader's only."""

    descriptor: RankDescriptor
    step_address: Address | None
    mover_address: Address | None


def run_rank(
    config: EngineConfig,
    place: RankPlace,
    on_progress: Callable[[int, int], None],
    on_ready: Callable[[EngineStatus], None],
    on_mailbox: Callable[[Mailbox[Command]], None],
    on_following: Callable[[], None],
    on_shared_fate: Callable[[str], None],
) -> str:
    """Serve until stopped; returns why it ended.

    Args:
        on_progress: bytes of weights loaded so far, and in all.
        on_ready: called on rank 0 once the engine can serve.
        on_mailbox: hands out the leader's mailbox, so that a signal handler can put a Shutdown in it.
        on_following: called on the other ranks once they take their orders from rank 0.
        on_shared_fate: another rank has failed while the engine started, and said why; must end this process.

    Raises:
        TandemError: the engine cannot start, or a rank was lost.
    """
    rank = _Rank(config, place, on_shared_fate)
    try:
        return rank.run(on_progress, on_ready, on_mailbox, on_following)
    except Exception as error:
        rank.tell_others(error)
        raise


class _Rank:
    def __init__(self, config: EngineConfig, place: RankPlace, on_shared_fate: Callable[[str], None]) -> None:
        self._on_shared_fate = on_shared_fate
        self._fate: SharedFate | None = None
        self.config = config
        self.place = place
        self.device = pick_device(config.model.device, place.local_rank)
        _set_threads(config, self.device)
        self.model: ModelConfig = load_config(config.model.path)
        self.dtype = self.model.torch_dtype(config.model.dtype)
        self.max_model_len = config.model.max_model_len or self.model.max_context
        self.model.check_max_model_len(self.max_model_len)
        key_file = config.network.cluster_key_file
        self.key = load_key(Path(key_file) if key_file else None)
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.sockets = Sockets(self.context, self.key)
        self.fingerprint = fingerprint(config.model.path, self.model)

    def run(
        self,
        on_progress: Callable[[int, int], None],
        on_ready: Callable[[EngineStatus], None],
        on_mailbox: Callable[[Mailbox[Command]], None],
        on_following: Callable[[], None],
    ) -> str:
        record = self._record()
        world = self._meet(record)
        try:
            agreement = agree(world, record)
        except StartError:
            self._end_start()  # every rank has come to this error by itself
            raise
        log.info("engine %s: rank %d of %d agreed", agreement.identity, world.rank, world.size)
        decoder = load_decoder(
            self.config.model.path, world.shard, world.collectives, self.dtype, self.device, on_progress
        )
        memory, layout = self._allocate(world, decoder)
        runner = Runner(decoder, memory.tensor, self.config.cache.block_size, world)
        leading = _Leading(self, agreement) if world.rank == 0 else None
        transport = _Moving(self, world, agreement, memory, layout)
        published = self._exchange(world, agreement, layout, transport.endpoint(), leading)
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
        text = str(error) if isinstance(error, TandemError) else f"{type(error).__name__}: {error}"
        self._fate.fail(f"rank {self.place.rank} on {hosts.gethostname()}: {text}")
        if self.place.rank == 0:
            time.sleep(LAST_WORD_SECONDS)  # the store ends with this process; the others look several times a second

    def _end_start(self) -> None:
        if self._fate is not None:
            self._fate.end()
            self._fate = None

    # --- coming together -----------------------------------------------------------------------------------------

    def _record(self) -> RankRecord:
        config, parallel, rank = self.config, self.config.parallel, self.place.rank
        return RankRecord(
            rank=rank,
            tp_rank=rank % parallel.tp,
            pp_rank=rank // parallel.tp,
            node_rank=parallel.node_rank,
            host=hosts.gethostname() if parallel.nnodes == 1 else f"{hosts.gethostname()} {self.place.host}",
            pid=os.getpid(),
            engine_id=config.engine_id,
            model=config.model.name,
            fingerprint=self.fingerprint,
            dtype=str(self.dtype).removeprefix("torch."),
            tp=parallel.tp,
            pp=parallel.pp,
            nnodes=parallel.nnodes,
            block_size=config.cache.block_size,
            max_model_len=self.max_model_len,
            connector=config.network.connector,
            protocol=PROTOCOL,
            version=__version__,
            identity=new_identity(config.engine_id) if rank == 0 else None,
        )

    def _meet(self, record: RankRecord) -> SoloWorld | TorchWorld:
        parallel, timeout = self.config.parallel, self.config.time.start_timeout
        if parallel.world_size == 1:
            return SoloWorld()
        master = parallel.master if parallel.nnodes > 1 else None
        started = time.monotonic()
        store = open_store(master, self.place.meeting_file, record.rank, timeout)
        left = max(1.0, timeout - (time.monotonic() - started))
        meet(store, record, parallel.world_size, left)
        self._fate = SharedFate(store.clone(), self._on_shared_fate)
        try:
            return TorchWorld(store, record.rank, parallel, self.device, self.place.host, max(60.0, timeout))
        except RuntimeError as error:
            raise StartError(f"the ranks met but could not connect: {str(error).splitlines()[0]}") from None

    def _allocate(self, world: SoloWorld | TorchWorld, decoder: Decoder) -> tuple[KvMemory, KvLayout]:
        """KV memory with as many blocks as the rank with the least room has."""
        size = self.config.cache.block_size
        block_bytes = kv_block_bytes(self.model, world.shard, size, self.dtype)
        own = kv_blocks(block_bytes, self.config.cache.kv_memory, self.device)
        blocks = min(int.from_bytes(data, "little") for data in world.all_gather(own.to_bytes(8, "little")))
        memory = KvMemory(kv_shape(self.model, world.shard, blocks, size), self.dtype, self.device)
        return memory, kv_layout(decoder, blocks, size)

    def _exchange(
        self,
        world: SoloWorld | TorchWorld,
        agreement: Agreement,
        layout: KvLayout,
        endpoint: RankEndpoint,
        leading: _Leading | None,
    ) -> list[_Published]:
        """Everybody's memory and the leader's addresses, to all ranks, over the world group."""
        record = agreement.records[world.rank]
        own = _Published(
            RankDescriptor(world.rank, record.tp_rank, record.pp_rank, record.host, layout, endpoint),
            leading.step_address if leading else None,
            leading.mover_address if leading else None,
        )
        gathered = world.all_gather(msgspec.msgpack.encode(own))
        return [msgspec.msgpack.decode(data, type=_Published) for data in gathered]

    def _follow(self, runner: Runner, published: list[_Published]) -> str:
        address = published[0].step_address
        assert address is not None
        options = SocketOptions(identity=b"%d" % self.place.rank)
        socket = self.sockets.connect(zmq.DEALER, address.host, address.port, options)
        return Follower(runner, socket).run()


class _Moving:
    """Starts this rank's transfer thread, which makes the transport, and then waits to hear of the others."""

    def __init__(
        self, rank: _Rank, world: SoloWorld | TorchWorld, agreement: Agreement, memory: KvMemory, layout: KvLayout
    ) -> None:
        self._rank = rank
        self._number = world.rank
        self._agent = f"{agreement.identity.engine_id}/{agreement.identity.incarnation}/{world.rank}"
        self._memory = memory
        self._described: Mailbox[RankEndpoint | BaseException] = Mailbox()
        self._published: Mailbox[list[_Published]] = Mailbox()
        self._serving = False
        start_mover(self._make, f"mover-{world.rank}", self._failed)

    def endpoint(self) -> RankEndpoint:
        """How peers reach this rank. Raises what the transport raised."""
        described = self._described.wait(TRANSFER_START_SECONDS)
        if described is None:
            raise StartError(f"the transport did not start in {TRANSFER_START_SECONDS:.0f} s")
        if isinstance(described, BaseException):
            raise described
        return described

    def connect(self, published: list[_Published]) -> None:
        """Let the transfer thread find the leader."""
        self._serving = True
        self._published.put(published)

    def _make(self) -> Mover:
        """In the transfer thread."""
        rank = self._rank
        make = transport_factory(rank.config.network.connector, rank.key)
        transport = make(self._agent, rank.place.host)
        transport.register(self._memory.region)
        self._described.put(transport.describe())
        published = self._published.wait(COLLECTIVE_SECONDS)
        if published is None:
            raise StartError("the other ranks did not publish their memory")
        address = published[0].mover_address
        assert address is not None
        options = SocketOptions(identity=b"%d" % self._number)
        socket = rank.sockets.connect(zmq.DEALER, address.host, address.port, options)
        return Mover(self._number, [p.descriptor.layout for p in published], transport, socket)

    def _failed(self, error: BaseException) -> None:
        if self._serving:
            os._exit(70)  # nothing can be moved without this thread; the launcher says that the rank died
        self._described.put(error)


class _Leading:
    """What only rank 0 has: the sockets of the leader, bound before the ranks hear of them, and the step loop."""

    def __init__(self, rank: _Rank, agreement: Agreement) -> None:
        self._rank = rank
        self._agreement = agreement
        host = rank.place.host
        self._async_context = zmq.asyncio.Context()
        self._async_sockets: Sockets[zmq.asyncio.Socket] = Sockets(self._async_context, rank.key)
        options = SocketOptions(mandatory=False, handover=True)
        self._step_socket, step_port = rank.sockets.bind(zmq.ROUTER, host, 0, options)
        self._mover_socket, mover_port = self._async_sockets.bind(zmq.ROUTER, host, 0, options)
        self._peer_socket, peer_port = self._async_sockets.bind(zmq.ROUTER, host, 0, options)
        self.step_address = Address(host, step_port)
        self.mover_address = Address(host, mover_port)
        self.peer_address = Address(host, peer_port)

    def run(
        self,
        runner: Runner,
        world: SoloWorld | TorchWorld,
        published: list[_Published],
        on_ready: Callable[[EngineStatus], None],
        on_mailbox: Callable[[Mailbox[Command]], None],
    ) -> str:
        pipeline: SoloPipeline | LeaderPipeline = SoloPipeline(runner)
        if world.size > 1:
            pipeline = LeaderPipeline(runner, self._step_socket, world.size)
            pipeline.wait_for_followers()
        mailbox: Mailbox[Command] = Mailbox()
        leader = self._leader(pipeline, mailbox, published)
        switchboard = self._switchboard(mailbox, leader, published)
        leader.attach(switchboard)
        switchboard.start()
        on_mailbox(mailbox)
        on_ready(self._status(leader, switchboard))
        reason = "it failed"
        try:
            reason = leader.run()
            return reason
        finally:
            switchboard.stop(reason)
            pipeline.close()

    def _leader(
        self, pipeline: SoloPipeline | LeaderPipeline, mailbox: Mailbox[Command], published: list[_Published]
    ) -> Leader:
        rank, config = self._rank, self._rank.config
        layout = published[0].descriptor.layout
        pool = BlockPool(layout.blocks, layout.block_size)
        limits = Limits(
            config.batch.max_num_seqs,
            config.batch.max_batched_tokens,
            config.batch.max_waiting,
            rank.max_model_len,
            rank.model.vocab_size,
        )
        scheduler = Scheduler(limits, pool, rank.model.eos_token_ids, config.parallel.pp)
        identity = self._agreement.identity
        params = KvTransferParams(
            do_remote_prefill=True,
            remote_engine_id=identity.engine_id,
            remote_incarnation=identity.incarnation,
            tp_size=config.parallel.tp,
        )
        return Leader(scheduler, pool, pipeline, mailbox, config.network.connector, config.kv_failure, params)

    def _switchboard(self, mailbox: Mailbox[Command], leader: Leader, published: list[_Published]) -> Switchboard:
        rank, config = self._rank, self._rank.config
        record = self._agreement.records[0]
        wiring = Wiring(
            config=config,
            descriptor=EngineDescriptor(
                self._agreement.identity, config.cache.block_size, [p.descriptor for p in published]
            ),
            envelope=Envelope(
                PROTOCOL, rank.fingerprint, record.dtype, config.network.connector, f"tandem {__version__}"
            ),
            fronts=rank.place.fronts,
            context=self._async_context,
            sockets=self._async_sockets,
            peer_socket=self._peer_socket,
            mover_socket=self._mover_socket,
            register=lambda: self._register(leader, switchboard),
        )
        switchboard = Switchboard(wiring, mailbox)
        return switchboard

    def _register(self, leader: Leader, switchboard: Switchboard) -> Register:
        rank, config = self._rank, self._rank.config
        return Register(
            identity=self._agreement.identity,
            status=self._status(leader, switchboard),
            peer_address=self.peer_address,
            max_model_len=rank.max_model_len,
            max_waiting=config.batch.max_waiting,
            model_path=config.model.path,
            dtype=self._agreement.records[0].dtype,
            version=__version__,
            protocol=PROTOCOL,
            http_address=rank.place.http_address,
        )

    def _status(self, leader: Leader, switchboard: Switchboard) -> EngineStatus:
        config, snapshot = self._rank.config, leader.snapshot
        listener, consumer = switchboard.listener, switchboard.consumer
        return EngineStatus(
            engine_id=self._agreement.identity.engine_id,
            incarnation=self._agreement.identity.incarnation,
            role=config.role,
            model=config.model.name,
            fingerprint=self._rank.fingerprint,
            tp=config.parallel.tp,
            pp=config.parallel.pp,
            nnodes=config.parallel.nnodes,
            connector=config.network.connector,
            ranks=self._agreement.ranks,
            kv=snapshot.kv,
            requests=snapshot.requests,
            peers=consumer.peers if consumer else [],
            identity_time=self._agreement.seconds,
            counters=msgspec.structs.replace(
                snapshot.counters,
                kv_failures=consumer.failures if consumer else 0,
                leases_expired=listener.expired if listener else 0,
                bad_messages=listener.bad_messages if listener else 0,
            ),
        )


def _set_threads(config: EngineConfig, device: torch.device) -> None:
    """All cores of the node for the ranks of one engine, unless told otherwise: engines seldom all compute at once."""
    if device.type != "cpu":
        return
    ranks = len(config.parallel.local_ranks)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
