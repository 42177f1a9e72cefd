"""The leader, which is rank 0: the scheduler, the step loop, and the event loop beside it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from tandem import __version__
from tandem.api.grammars import load_compiler
from tandem.config import EngineConfig
from tandem.engine.io.event_loop import LeaderEventLoop
from tandem.engine.io.leader_sockets import LeaderSockets
from tandem.engine.mailbox import Mailbox
from tandem.engine.start.engine_map import EngineMap
from tandem.engine.start.rank import Rank
from tandem.engine.step.masks import MaskMaker
from tandem.engine.step.pipeline import LeaderPipeline, SoloPipeline
from tandem.engine.step.runner import Runner
from tandem.engine.step.step_loop import StepLoop
from tandem.engine.step.step_message import StepEncoder
from tandem.engine.step_commands import Command
from tandem.errors import EngineFailed
from tandem.kv.blocks import BlockPool
from tandem.scheduling.admission import Limits
from tandem.scheduling.scheduler import Scheduler
from tandem.transfer.handshake import PROTOCOL, EngineDescriptor
from tandem.transfer.identity import Agreement
from tandem.wire.engine_status import EngineStatus
from tandem.wire.messages import KvTransferParams, Register
from tandem.wire.peer_messages import Envelope


class Leader:
    """Rank 0 of an engine. Everything is made here, in the order in which one part needs another.

    Args:
        end_process: ends this process, with the error, when the step loop cannot.

    Attributes:
        mailbox: of the step loop; a Shutdown in it ends the engine.
    """

    def __init__(
        self,
        rank: Rank,
        agreement: Agreement,
        engine: EngineMap,
        sockets: LeaderSockets,
        runner: Runner,
        end_process: Callable[[EngineFailed], None],
    ) -> None:
        config, identity, dtype = rank.config, agreement.identity, agreement.records[0].dtype
        connector, layout = rank.connector, engine.ranks[0].layout
        self._start_timeout = config.time.start_timeout
        self.mailbox: Mailbox[Command] = Mailbox()
        size = len(engine.ranks)
        self._masks = MaskMaker(
            functools.partial(load_compiler, Path(rank.placement.model.path), rank.model.eos_token_ids)
        )
        self._pipeline = self._make_pipeline(runner, config, sockets, size)
        pool = BlockPool(layout.blocks, layout.block_size)
        scheduler = _scheduler(rank, pool)
        self._status = _initial_status(rank, agreement, engine, scheduler)
        descriptor = EngineDescriptor(identity, config.cache.block_size, engine.ranks)
        envelope = Envelope(PROTOCOL, engine.fingerprint, dtype, connector, f"tandem {__version__}")
        registration = _registration(rank, agreement, self._status, sockets)
        self._event_loop = LeaderEventLoop(
            config, descriptor, envelope, registration, sockets, rank.placement.frontends, self.mailbox, end_process
        )
        published = KvTransferParams(
            do_remote_prefill=True,
            remote_engine_id=identity.engine_id,
            remote_incarnation=identity.incarnation,
            tp_size=config.parallel.tp,
        )
        self._step_loop = StepLoop(
            scheduler,
            pool,
            self._pipeline,
            self.mailbox,
            self._event_loop,
            connector,
            config.run.kv_failure,
            published,
            self._event_loop.clock,
            self._masks,
        )

    def _make_pipeline(
        self, runner: Runner, config: EngineConfig, sockets: LeaderSockets, size: int
    ) -> LeaderPipeline | SoloPipeline:
        steps = StepEncoder(config.batch.max_num_seqs)
        if size == 1:
            sockets.step.close(linger=0)  # what strangers sent to it nobody would read
            return SoloPipeline(runner, steps, self._masks)
        sampler = size - config.parallel.tp  # the first rank of the last stage
        return LeaderPipeline(runner, steps, sockets.step, size, self._masks, sampler)

    def drain(self) -> None:
        """Take no new requests, and end when those that are here have ended and their KV was read; bounded.

        May be called by a signal handler.
        """
        self._event_loop.drain()

    @property
    def drains(self) -> bool:
        return self._event_loop.draining

    def run(self, on_ready: Callable[[EngineStatus], None]) -> str:
        """Serve until told to stop; return why.

        Args:
            on_ready: called once the engine can serve.

        Raises:
            EngineFailed: a rank was lost.
        """
        self._pipeline.wait_for_followers()
        reason, failed = "it failed", True
        try:
            self._event_loop.start(self._pipeline.results, self._start_timeout)
            on_ready(self._status)
            reason, failed = self._step_loop.run(), False
            return reason
        except EngineFailed as error:
            reason = str(error)
            raise
        finally:
            self._event_loop.stop(reason, failed=failed)
            self._pipeline.close(reason, failed=failed)
            self._masks.close()


def _scheduler(rank: Rank, pool: BlockPool) -> Scheduler:
    batch = rank.config.batch
    limits = Limits(
        batch.max_num_seqs, batch.max_batched_tokens, batch.max_waiting, rank.max_model_len, rank.model.vocab_size
    )
    return Scheduler(limits, pool, rank.model.eos_token_ids, rank.config.parallel.pp)


def _initial_status(rank: Rank, agreement: Agreement, engine: EngineMap, scheduler: Scheduler) -> EngineStatus:
    config = rank.config
    return EngineStatus(
        engine_id=agreement.identity.engine_id,
        incarnation=agreement.identity.incarnation,
        role=config.role,
        model=rank.placement.model.name,
        fingerprint=engine.fingerprint,
        tp=config.parallel.tp,
        pp=config.parallel.pp,
        nnodes=config.parallel.nnodes,
        connector=rank.connector,
        ranks=agreement.ranks,
        kv=scheduler.kv_usage(),
        requests=scheduler.counts(),
        peers=[],
        identity_time=agreement.seconds,
    )


def _registration(rank: Rank, agreement: Agreement, status: EngineStatus, sockets: LeaderSockets) -> Register:
    config = rank.config
    return Register(
        identity=agreement.identity,
        status=status,
        peer_address=sockets.addresses.peer,
        max_model_len=rank.max_model_len,
        max_waiting=config.batch.max_waiting,
        model_path=rank.placement.model.path,
        model_aliases=list(rank.placement.model.aliases),
        dtype=agreement.records[0].dtype,
        version=__version__,
        protocol=PROTOCOL,
        vocab_size=rank.model.vocab_size,
        step_timeout=config.batch.step_timeout,
        drain_timeout=config.drain_timeout,
        http_address=rank.placement.http_address,
    )
