"""What only rank 0 has: the sockets of the leader, scheduler, event loop and step loop."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import zmq
import zmq.asyncio

from tandem import __version__
from tandem.engine.commands import Command
from tandem.engine.io.event_loop import LeaderEventLoop, Wiring
from tandem.engine.mailbox import Mailbox
from tandem.engine.start.rank import Published, Rank
from tandem.engine.step.pipeline import LEADER_SOCKET, LeaderPipeline, SoloPipeline
from tandem.engine.step.runner import Runner
from tandem.engine.step.step_loop import StepLoop
from tandem.engine.world import SoloWorld, TorchWorld
from tandem.errors import EngineFailed
from tandem.kv.blocks import BlockPool
from tandem.scheduling.admission import Limits
from tandem.scheduling.scheduler import Scheduler
from tandem.transfer.handshake import PROTOCOL, EngineDescriptor
from tandem.transfer.identity import Agreement
from tandem.wire.messages import Address, EngineStatus, KvTransferParams, Register
from tandem.wire.peer_messages import Envelope
from tandem.wire.sockets import SocketOptions, Sockets


class Leading:
    """What only rank 0 has: the sockets of the leader, bound before the ranks hear of them, and the step loop.

    Args:
        end_process: ends this process, with the reason, when the step loop cannot.
    """

    def __init__(self, rank: Rank, agreement: Agreement, end_process: Callable[[str], None]) -> None:
        self._end_process = end_process
        self._rank = rank
        self._agreement = agreement
        host = rank.place.host
        self._async_context = zmq.asyncio.Context()
        self._async_sockets: Sockets[zmq.asyncio.Socket] = Sockets(self._async_context, rank.key)
        options = SocketOptions(mandatory=False, handover=True)
        self._step_socket, step_port = rank.sockets.bind(zmq.ROUTER, host, 0, LEADER_SOCKET)
        self._transfer_socket, mover_port = self._async_sockets.bind(zmq.ROUTER, host, 0, options)
        self._peer_socket, peer_port = self._async_sockets.bind(zmq.ROUTER, host, 0, options)
        self.step_address = Address(host, step_port)
        self.transfer_address = Address(host, mover_port)
        self.peer_address = Address(host, peer_port)

    def run(
        self,
        runner: Runner,
        world: SoloWorld | TorchWorld,
        published: list[Published],
        on_ready: Callable[[EngineStatus], None],
        on_mailbox: Callable[[Mailbox[Command]], None],
    ) -> str:
        pipeline: SoloPipeline | LeaderPipeline = SoloPipeline(runner)
        if world.size > 1:
            pipeline = LeaderPipeline(runner, self._step_socket, world.size)
            pipeline.wait_for_followers()
        mailbox: Mailbox[Command] = Mailbox()
        leader = self._leader(pipeline, mailbox, published)
        event_loop = self._switchboard(mailbox, leader, published)
        leader.attach(event_loop)
        reason, failed = "it failed", True
        try:
            event_loop.start(pipeline.results, self._rank.config.time.start_timeout)
            on_mailbox(mailbox)
            on_ready(self._status(leader, event_loop))
            reason, failed = leader.run(), False
            return reason
        except EngineFailed as error:
            reason = str(error)
            raise
        finally:
            event_loop.stop(reason)
            pipeline.close(reason, failed=failed)

    def _leader(
        self, pipeline: SoloPipeline | LeaderPipeline, mailbox: Mailbox[Command], published: list[Published]
    ) -> StepLoop:
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
        return StepLoop(scheduler, pool, pipeline, mailbox, rank.connector, config.run.kv_failure, params)

    def _switchboard(self, mailbox: Mailbox[Command], leader: StepLoop, published: list[Published]) -> LeaderEventLoop:
        rank, config = self._rank, self._rank.config
        record = self._agreement.records[0]
        wiring = Wiring(
            config=config,
            descriptor=EngineDescriptor(
                self._agreement.identity, config.cache.block_size, [p.descriptor for p in published]
            ),
            envelope=Envelope(PROTOCOL, rank.fingerprint, record.dtype, rank.connector, f"tandem {__version__}"),
            frontends=rank.place.frontends,
            context=self._async_context,
            sockets=self._async_sockets,
            peer_socket=self._peer_socket,
            transfer_socket=self._transfer_socket,
            register=lambda: self._register(leader, event_loop),
        )
        event_loop = LeaderEventLoop(wiring, mailbox, self._end_process)
        return event_loop

    def _register(self, leader: StepLoop, event_loop: LeaderEventLoop) -> Register:
        rank, config = self._rank, self._rank.config
        return Register(
            identity=self._agreement.identity,
            status=self._status(leader, event_loop),
            peer_address=self.peer_address,
            max_model_len=rank.max_model_len,
            max_waiting=config.batch.max_waiting,
            model_path=rank.place.model.path,
            dtype=self._agreement.records[0].dtype,
            version=__version__,
            protocol=PROTOCOL,
            http_address=rank.place.http_address,
        )

    def _status(self, leader: StepLoop, event_loop: LeaderEventLoop) -> EngineStatus:
        config, snapshot = self._rank.config, leader.snapshot
        listener, dialer = event_loop.listener, event_loop.dialer
        return EngineStatus(
            engine_id=self._agreement.identity.engine_id,
            incarnation=self._agreement.identity.incarnation,
            role=config.role,
            model=self._rank.place.model.name,
            fingerprint=self._rank.fingerprint,
            tp=config.parallel.tp,
            pp=config.parallel.pp,
            nnodes=config.parallel.nnodes,
            connector=self._rank.connector,
            ranks=self._agreement.ranks,
            kv=snapshot.kv,
            requests=snapshot.requests,
            peers=dialer.peers if dialer else [],
            identity_time=self._agreement.seconds,
            counters=msgspec.structs.replace(
                snapshot.counters,
                kv_failures=dialer.failures if dialer else 0,
                leases_expired=listener.expired if listener else 0,
                bad_messages=listener.bad_messages if listener else 0,
            ),
        )
