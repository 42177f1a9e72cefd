"""An engine: the real event loop, step loop, scheduler and transfer threads, around a simulated model and memory."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

import zmq

from tandem.config import BatchSection, EngineConfig, TimeSection
from tandem.engine.io import event_loop
from tandem.engine.io.leader_sockets import LeaderAddresses, LeaderSockets
from tandem.engine.step.step_loop import IDLE_SECONDS, StepLoop
from tandem.engine.step_commands import Command, Shutdown
from tandem.errors import EngineFailed
from tandem.ids import EngineIdentity, new_identity
from tandem.kv.blocks import BlockPool
from tandem.kv.layout import block_major, token_major
from tandem.kv.shard import shard
from tandem.scheduling.admission import Limits
from tandem.scheduling.batch import Batch, Row, Sampled, StepResult
from tandem.scheduling.request import Request
from tandem.scheduling.scheduler import Scheduler
from tandem.transfer.handshake import PROTOCOL, EngineDescriptor, RankDescriptor
from tandem.transfer.thread.transfer_thread import BEAT_SECONDS, TransferThread
from tandem.wire.engine_status import EngineStatus
from tandem.wire.messages import Address, KvTransferParams, Register
from tandem.wire.peer_messages import Envelope
from tests.scheduling.invariants import check_scheduler
from tests.simulator.model import EOS, ITEM, VOCABULARY, Memory, extend_digests, next_token
from tests.simulator.network import Network
from tests.simulator.plan import MAX_PROMPT, MAX_TOKENS, EngineSpec, Plan
from tests.simulator.reads import Fabric, Place, SimTransport
from tests.simulator.sockets import Socket, Sockets
from tests.simulator.world import Process, World
from tests.support.grammars import no_grammars

LAYERS = HEADS = 2
MAX_WAITING = 6
HAND_OVER_SECONDS = (0.00001, 0.002)
"""From one thread to another."""

STEP_TIMEOUT = 60.0
DRAIN_SECONDS = 5.0
LATE_SECONDS = 0.6
"""An engine ends a request at its deadline, or as soon as the step loop looks."""

Main = Callable[[Callable[[], None], "asyncio.Future[str]"], Coroutine[Any, Any, None]]


class SimEventLoopThread:
    """Stands in for `EventLoopThread`: its thread is a task of the simulated process that makes it."""

    process: Process
    """Of the engine that is being made."""

    def __init__(self, main: Main, mailbox: Any, end_process: Callable[[EngineFailed], None]) -> None:
        self._process = SimEventLoopThread.process
        self._main = main
        self._mailbox = mailbox
        self._end_process = end_process
        self._stopping: asyncio.Future[str] = self._process.world.loop.create_future()
        self._last = 0.0
        self.ready = False
        self.on_ended: Callable[[], None] = lambda: None

    def start(self, check_ranks: Callable[[], object], seconds: float) -> None:
        self._process.world.loop.create_task(self._run())

    async def _run(self) -> None:
        try:
            await self._main(self._is_ready, self._stopping)
            self._mailbox.put(Shutdown("the event loop has ended"))
        except EngineFailed as error:
            self._end_process(error)
        finally:
            self.on_ended()

    def _is_ready(self) -> None:
        self.ready = True

    def call(self, action: Callable[[], object]) -> None:
        """Run `action` a little later, after what was given before."""
        world = self._process.world
        self._last = max(self._last, world.now + world.wait(*HAND_OVER_SECONDS))
        world.at(self._last, action, self._process)

    def stop(self, reason: str) -> None:
        if not self._stopping.done():
            self._stopping.set_result(reason)


class SimMailbox:
    """Stands in for `Mailbox`: wakes the step loop without a socket."""

    def __init__(self) -> None:
        self._items: deque[Command] = deque()
        self.wake: Callable[[], None] = lambda: None

    def put(self, item: Command) -> None:
        self._items.append(item)
        self.wake()

    def __len__(self) -> int:
        return len(self._items)

    def take(self) -> list[Command]:
        items = list(self._items)
        self._items.clear()
        return items


class SimPipeline:
    """Runs batches on the memories of all ranks. Without pipeline stages `submit` computes, as one process does."""

    def __init__(self, engine: SimEngine) -> None:
        self._engine = engine
        self._done: deque[StepResult] = deque()
        self._last = 0.0
        self.busy_until = 0.0
        self.batches = 0

    def submit(self, batch: Batch) -> None:
        self.batches += 1
        engine, world = self._engine, self._engine.world
        seconds = engine.spec.step_seconds * world.random.uniform(0.5, 1.5)
        if engine.spec.pp == 1:
            self._compute(batch)
            self.busy_until = world.now + seconds
            return
        self.busy_until = world.now + seconds / engine.spec.pp
        self._last = max(self._last, world.now) + seconds

        def done() -> None:
            self._compute(batch)
            engine.wake_step_loop()

        world.at(self._last, done, engine.process)

    def results(self) -> list[StepResult]:
        results = list(self._done)
        self._done.clear()
        return results

    def fileno(self) -> int | None:
        return None

    def _compute(self, batch: Batch) -> None:
        entries = next(one.entries for one in self._engine.scheduler.in_flight if one.batch_id == batch.batch_id)
        sampled = [self._row(entry.request, row) for entry, row in zip(entries, batch.rows, strict=True)]
        self._done.append(StepResult(batch.batch_id, sampled))

    def _row(self, request: Request, row: Row) -> Sampled | None:
        engine = self._engine
        end = row.start + len(row.tokens)
        digests = engine.digests(request)
        for memory in engine.memories:
            wrong = memory.holds(row.block_ids, 0, row.start, digests)
            if wrong is not None:
                engine.world.fail(f"{engine.spec.name}: {row.request_id} computes from wrong KV at token {wrong}")
            memory.write(row.block_ids, row.start, end, digests)
        if row.sample is None:
            return None
        return Sampled(next_token(digests[end - 1], engine.spec.salt, row.sample.banned_ids))


class SimEngine:
    """One incarnation of an engine: a process with all its ranks."""

    def __init__(
        self, world: World, network: Network, fabric: Fabric, plan: Plan, spec: EngineSpec, address: Address,
        routers: list[Address],
    ) -> None:  # fmt: skip
        self.world = world
        self.network = network
        self.spec = spec
        self.process = process = Process(world, spec.name, spec.rate, 1000.0 * world.random.random())
        self.identity: EngineIdentity = new_identity(spec.name)
        self.pool = BlockPool(spec.blocks, spec.block_size)
        limits = Limits(
            spec.max_num_seqs, spec.max_batched_tokens, MAX_WAITING, 2 * (MAX_PROMPT + MAX_TOKENS), VOCABULARY
        )
        self.scheduler = Scheduler(limits, self.pool, EOS, spec.pp)
        self._digests: dict[int, list[int]] = {}
        self._wake_at = float("inf")
        self._unasked = False
        self._fabric = fabric
        self.transports: list[SimTransport] = []
        self._thread_asked: set[int] = set()
        ranks = [self._rank(rank) for rank in range(spec.tp * spec.pp)]
        layouts = [rank.layout for rank in ranks]
        self.memories = [fabric.places[rank.endpoint.agent].memory for rank in ranks]
        self.mailbox = SimMailbox()
        self.mailbox.wake = self.wake_step_loop
        self._leader(plan, EngineDescriptor(self.identity, spec.block_size, ranks), address, routers)
        self.threads = [self._transfer_thread(rank, layouts, address) for rank in range(len(ranks))]
        process.post(lambda: self.event_loop.start(lambda: None, 0.0))
        self.wake_step_loop()

    # --- its parts -----------------------------------------------------------------------------------------------

    def _rank(self, rank: int) -> RankDescriptor:
        spec = self.spec
        tp_rank, pp_rank = rank % spec.tp, rank // spec.tp
        held = shard(LAYERS, HEADS, tp=spec.tp, pp=spec.pp, tp_rank=tp_rank, pp_rank=pp_rank)
        make = token_major if spec.token_major else block_major
        layout = make(held, blocks=spec.blocks, block_size=spec.block_size, head_dim=1, itemsize=ITEM)
        agent = f"{self.identity.engine_id}/{self.identity.incarnation}/{rank}"
        transport = SimTransport(agent, Place(self, Memory.of(layout)), self._fabric, lambda: self._wake_thread(rank))
        self.transports.append(transport)
        return RankDescriptor(rank, tp_rank, pp_rank, spec.name, layout, transport.describe())

    def _leader(self, plan: Plan, descriptor: EngineDescriptor, address: Address, routers: list[Address]) -> None:
        spec = self.spec
        sockets = Sockets(self.network, self.process)
        transfer = Address(address.host, address.port + 1)
        leader_sockets = LeaderSockets(
            None,  # type: ignore[arg-type]  # no followers
            sockets.bind(transfer),
            sockets.bind(address),
            sockets,  # type: ignore[arg-type]
            LeaderAddresses(address, transfer, address),
        )
        register = self._registration(address)
        SimEventLoopThread.process = self.process
        self.world.current = self.process
        self.event_loop = event_loop.LeaderEventLoop(
            EngineConfig(
                role=spec.role,
                drain_timeout=DRAIN_SECONDS,
                time=TimeSection(lease_ttl=plan.lease_ttl),
                batch=BatchSection(step_timeout=STEP_TIMEOUT),
            ),
            descriptor,
            Envelope(PROTOCOL, "weights", "int", "simulated", "simulator"),
            register,
            leader_sockets,
            routers,
            self.mailbox,  # type: ignore[arg-type]
            self._end_process,
        )
        self.world.current = None
        self.pipeline = SimPipeline(self)
        self.step_loop = StepLoop(
            self.scheduler, self.pool, self.pipeline, self.mailbox, self.event_loop, "simulated", plan.kv_failure,  # type: ignore[arg-type]
            KvTransferParams(), self.event_loop.clock, no_grammars(),
        )  # fmt: skip

    def _registration(self, address: Address) -> Register:
        spec = self.spec
        status = EngineStatus(
            self.identity.engine_id, self.identity.incarnation, spec.role, "model", "weights", spec.tp, spec.pp, 1,
            "simulated", [], self.scheduler.kv_usage(), self.scheduler.counts(), [],
        )  # fmt: skip
        return Register(
            self.identity,
            status,
            address,
            self.scheduler.limits.max_model_len,
            MAX_WAITING,
            "/model",
            "int",
            "0",
            PROTOCOL,
            VOCABULARY,
            STEP_TIMEOUT,
            drain_timeout=DRAIN_SECONDS,
        )

    def _transfer_thread(self, rank: int, layouts: list[Any], address: Address) -> TransferThread:
        socket = Socket(self.network, self.process, zmq.DEALER, b"%d" % rank)
        socket.on_message = lambda: self._wake_thread(rank)
        transport = self.transports[rank]
        thread = TransferThread(rank, layouts, transport, socket)  # type: ignore[arg-type]
        socket.connect(Address(address.host, address.port + 1))
        self.process.post(lambda: self._beat(rank))
        return thread

    # --- what runs when ------------------------------------------------------------------------------------------

    def wake_step_loop(self) -> None:
        world = self.world
        self._step_at(max(self.pipeline.busy_until, world.now + world.wait(*HAND_OVER_SECONDS)))

    def _step_at(self, when: float, *, unasked: bool = False) -> None:
        if when >= self._wake_at:
            return
        self._wake_at = when

        def due() -> None:
            if self._wake_at == when:
                self._unasked = unasked
                self._step()

        self.world.at(when, due, self.process)

    def _step(self) -> None:
        self._wake_at = float("inf")
        loop, batches, requests = self.step_loop, self.pipeline.batches, len(self.scheduler.state.requests)
        unasked = self._unasked and not self.mailbox
        idle = loop._step()
        if unasked and self.pipeline.batches > batches and len(self.scheduler.state.requests) == requests:
            self.world.fail(f"{self.spec.name} had a batch to begin, and waited until it looked by itself")
        loop._clock.since = loop._submitted[0] if loop._submitted else None
        check_scheduler(self.scheduler)
        late = self.process.time() - LATE_SECONDS  # of this very step: it has looked
        for request in self.scheduler.state.requests.values():
            if request.deadline < late:
                self.world.fail(f"{self.spec.name} still has {request.request_id} after its deadline")
        if self.step_loop._stopping is not None:
            self._stop(self.step_loop._stopping)
        elif not idle:
            self._step_at(max(self.pipeline.busy_until, self.world.now + HAND_OVER_SECONDS[0]))
        else:
            self._step_at(self.world.now + IDLE_SECONDS, unasked=True)

    def _wake_thread(self, rank: int) -> None:
        if rank not in self._thread_asked:
            self._thread_asked.add(rank)
            self.world.after(self.world.wait(*HAND_OVER_SECONDS), lambda: self._step_thread(rank), self.process)

    def _step_thread(self, rank: int) -> None:
        self._thread_asked.discard(rank)
        self.threads[rank].step()

    def _beat(self, rank: int) -> None:
        self.threads[rank]._beat(self.process.time())
        self.world.after(BEAT_SECONDS, lambda: self._beat(rank), self.process)

    # --- its end -------------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """End in good order, as at SIGTERM."""
        self.process.post(self.event_loop.drain)

    def _stop(self, reason: str) -> None:
        thread: Any = self.event_loop._thread
        thread.on_ended = lambda: self.world.after(0.0, lambda: self.network.kill(self.process))
        self.event_loop.stop(reason, failed=False)

    def _end_process(self, error: EngineFailed) -> None:
        self.world.fail(f"{self.spec.name} ends: {error}")

    # --- what others look at -------------------------------------------------------------------------------------

    def digests(self, request: Request) -> list[int]:
        """Return a digest for each token of the request that is known so far."""
        return extend_digests(self._digests.setdefault(request.order, []), request.tokens)

    def may_be_written(self, block: int) -> bool:
        state = self.scheduler.state
        if any(block in blocks for blocks in state.quarantined.values()):
            return True
        return any(
            block in request.block_ids[request.num_cached // self.spec.block_size :] for request in state.waiting_for_kv
        )
