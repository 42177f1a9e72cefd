"""The leader's event loop: frontends, peers and transfer threads, beside and never on the step loop."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from tandem.config import EngineConfig
from tandem.engine.io.event_loop_thread import EventLoopThread
from tandem.engine.io.frontends import Frontend, FrontendEvents
from tandem.engine.io.introductions import Introductions
from tandem.engine.io.leader_sockets import LeaderSockets
from tandem.engine.io.step_watch import StepWatch
from tandem.engine.mailbox import Mailbox
from tandem.engine.outbox import KvEvent, Outputs
from tandem.engine.step_clock import StepClock
from tandem.engine.step_commands import (
    AbortRequest,
    Command,
    Drain,
    KvArrived,
    KvCorrupt,
    KvFailed,
    LeasesEnded,
    ReadsEnded,
    StartRequest,
)
from tandem.errors import EngineFailed, InvalidRequest
from tandem.ids import prompt_digest
from tandem.scheduling.events import BlocksAllocated, ChunkComputed, PrefillEnded, PullEnded, ShortOfBlocks
from tandem.transfer.decode.dialer import PeerDialer, PullEvents
from tandem.transfer.handshake import EngineDescriptor
from tandem.transfer.prefill.listener import PeerListener
from tandem.transfer.thread.leader_side import TransferThreads
from tandem.wire.control_messages import ChangeRole, DrainEngine, EngineControl
from tandem.wire.engine_status import EngineCounters, KvUsage, RequestCounts
from tandem.wire.messages import Address, Generate, Introduce, Prefill, PullKv, Register
from tandem.wire.peer_messages import Envelope

log = logging.getLogger(__name__)


class LeaderEventLoop:
    """Joins frontends, peers and transfer threads with the step loop, whose `Outbox` this is.

    Everything is made before the thread starts, and touched by the thread alone from then on; other threads call
    `start`, `stop` and `post_*`. What comes in goes to the step loop's mailbox.

    Args:
        descriptor: of this engine, for its peers.
        registration: at the frontends; its status is kept up to date.
        end_process: ends this process, with the error, when the step loop hangs and cannot.

    Attributes:
        clock: for the step loop to keep.
        draining: no new requests are taken, and the engine is about to end.
    """

    def __init__(
        self,
        config: EngineConfig,
        descriptor: EngineDescriptor,
        envelope: Envelope,
        registration: Register,
        sockets: LeaderSockets,
        frontends: Sequence[Address],
        mailbox: Mailbox[Command],
        end_process: Callable[[EngineFailed], None],
    ) -> None:
        self._access = config.access
        self._block_size = descriptor.block_size
        self._max_published = int(config.cache.max_published_kv * descriptor.ranks[0].layout.blocks)
        self.clock = StepClock()
        self._step_watch = StepWatch(self.clock, config.batch.step_timeout)
        self._registration, self._status = registration, registration.status
        self._mailbox = mailbox
        self._role: str = config.role
        self._drain_timeout = config.drain_timeout
        self.draining = self._failed = False
        self._introductions = Introductions()
        self._thread = EventLoopThread(self._serve, mailbox, end_process)
        self._transfer_socket = sockets.transfer
        self._transfer_threads = TransferThreads(sockets.transfer, len(descriptor.ranks))
        self._dialer = PeerDialer(
            descriptor.identity,
            envelope,
            [rank.layout for rank in descriptor.ranks],
            self._transfer_threads,
            sockets.event_loop,
            _pull_events(mailbox),
            verify=config.cache.verify_kv,
        )
        self._listener = PeerListener(
            sockets.peer,
            descriptor.identity,
            envelope,
            descriptor,
            config.time.lease_ttl,
            self._max_published,
            on_ended=lambda request_ids: mailbox.put(LeasesEnded(request_ids)),
            on_corrupt=lambda request_ids: mailbox.put(KvCorrupt(request_ids)),
        )
        self._frontends = [self._frontend(number, address, sockets) for number, address in enumerate(frontends)]

    def _frontend(self, number: int, address: Address, sockets: LeaderSockets) -> Frontend:
        events = FrontendEvents(
            generate=functools.partial(self._begin, number),
            abort=self._abort,
            introduce=functools.partial(self._introduce, number),
            control=self._control,
            lost=functools.partial(self._introductions.forget, number),
        )
        incarnation = self._registration.identity.incarnation
        return Frontend(address, sockets.event_loop, incarnation, self._current_registration, events)

    def start(self, check_ranks: Callable[[], object], seconds: float) -> None:
        """Return once all transfer threads are there and the frontends are being called.

        Args:
            check_ranks: raises EngineFailed when a rank is lost; called again and again meanwhile.
        """
        self._thread.start(check_ranks, seconds)

    def drain(self) -> None:
        """Take no new requests, and end when those that are here have ended and their KV was read; bounded.

        The frontends know from the next heartbeat on. Any thread may call it, and a signal handler.
        """
        self.draining = True
        self._mailbox.put(Drain(time.monotonic() + self._drain_timeout))

    def stop(self, reason: str, *, failed: bool) -> None:
        """Say goodbye to the frontends and end the thread; bounded. `failed`: not because somebody asked for it."""
        self._failed = failed
        self._thread.stop(reason)

    def post_kv(self, events: list[KvEvent]) -> None:
        def handle() -> None:
            for event in events:
                self._handle_kv_event(event)

        self._thread.call(handle)

    def post_outputs(self, outputs: Outputs) -> None:
        def send() -> None:
            for number, items in outputs.items():
                self._frontends[number].send(items)

        self._thread.call(send)

    def post_status(self, kv: KvUsage, requests: RequestCounts, counters: EngineCounters) -> None:
        self._status = msgspec.structs.replace(self._status, kv=kv, requests=requests, counters=counters)

    # --- the thread ----------------------------------------------------------------------------------------------

    async def _serve(self, ready: Callable[[], None], stopping: asyncio.Future[str]) -> None:
        tasks = [
            asyncio.create_task(coroutine)
            for coroutine in (
                self._transfer_threads.run(self._dialer.reported),
                self._transfer_threads.watch(),
                self._listener.run(),
                self._dialer.run(),
                self._step_watch.run(),
                self._serve_frontends(ready),
            )
        ]
        failed = None
        try:
            awaited: list[asyncio.Future[Any]] = [*tasks, stopping]
            await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
            await self._leave_frontends(stopping.result(), failed=self._failed)
        except Exception as error:
            failed = str(error)
            await self._leave_frontends(failed, failed=True)
            raise
        finally:
            self._transfer_threads.stop(failed)
            self._dialer.close()
            await _cancel(tasks)
            self._transfer_socket.close(linger=500)

    async def _leave_frontends(self, reason: str, *, failed: bool) -> None:
        await asyncio.gather(*(frontend.leave(reason, failed=failed) for frontend in self._frontends))

    async def _serve_frontends(self, ready: Callable[[], None]) -> None:
        await self._transfer_threads.ready.wait()
        ready()
        async with asyncio.TaskGroup() as group:
            for frontend in self._frontends:
                group.create_task(frontend.run())

    def _current_registration(self) -> Register:
        status = self._status
        counters = msgspec.structs.replace(
            status.counters,
            kv_failures=self._dialer.failures,
            kv_corrupt=self._dialer.corrupt,
            leases_expired=self._listener.expired,
            published_dropped=self._listener.gave_way,
            bad_messages=self._listener.bad_messages,
        )
        status = msgspec.structs.replace(
            status,
            role=self._role,
            peers=self._dialer.peers,
            counters=counters,
            draining=self.draining,
            step_seconds=self._step_watch.seconds,
        )
        return msgspec.structs.replace(self._registration, status=status)

    def _begin(self, frontend: int, message: Generate) -> None:
        """Hand a request to the step loop. Raises InvalidRequest, or an error of our own; then nothing of it stays."""
        request_id, kv = message.request_id, message.kv
        if self._listener.knows(request_id) or self._dialer.knows(request_id):
            raise InvalidRequest(f"request id {request_id} is in use; every request needs its own", param="request_id")
        if isinstance(kv, PullKv) and kv.foreign and not self._access.allows(kv.address.host):
            raise InvalidRequest(
                f"remote_host {kv.address.host} is not within this engine's --allow-peers", param="kv_transfer_params"
            )
        if isinstance(kv, Prefill) and kv.published:
            self._check_room(len(message.token_ids))
        try:
            if isinstance(kv, Prefill):  # before the step loop can compute a chunk of it
                self._listener.begin(request_id, prompt_digest(message.token_ids), published=kv.published)
            self._mailbox.put(StartRequest(frontend, message))
            if isinstance(kv, PullKv):
                self._dialer.open(request_id, kv, prompt_digest(message.token_ids), len(message.token_ids))
        except Exception:
            self._mailbox.put(AbortRequest(request_id))
            self._listener.abort(request_id, "it could not begin")
            self._dialer.give_up(request_id, "it could not begin")
            raise

    def _check_room(self, num_tokens: int) -> None:
        """Raise InvalidRequest for a prompt whose KV could not even wait here alone."""
        blocks = -(-num_tokens // self._block_size)
        if blocks > self._max_published:
            raise InvalidRequest(
                f"the prompt of {num_tokens} tokens needs {blocks} KV blocks; KV that waits for a decode engine may"
                f" hold {self._max_published} of this engine's. Shorten the prompt, or give the engine more --kv-memory"
                " or a larger --max-published-kv.",
                param="prompt",
            )

    def _introduce(self, frontend: int, message: Introduce) -> None:
        self._dialer.introduce(self._introductions.add(frontend, message))

    def _control(self, message: EngineControl) -> None:
        match message:
            case DrainEngine():
                log.info("a router wants this engine to drain: it ends within %.0f s", self._drain_timeout)
                self.drain()
            case ChangeRole(role=role):
                log.info("a router changes the role of this engine from %s to %s", self._role, role)
                self._role = role

    def _abort(self, request_id: str) -> None:
        self._mailbox.put(AbortRequest(request_id))
        self._listener.withdraw(request_id)  # a prefill that is done is not the step loop's any more

    def _handle_kv_event(self, event: KvEvent) -> None:
        match event:
            case ChunkComputed():
                self._listener.chunk(
                    event.request_id, event.first_block, event.block_ids, event.num_tokens, event.final, event.token
                )
            case PrefillEnded(request_id=request_id, ok=ok):
                if not ok:
                    self._listener.abort(request_id, "the prefill ended early")
            case BlocksAllocated():
                self._dialer.allocated(event.request_id, event.block_ids, event.num_cached_tokens, event.num_tokens)
            case PullEnded(request_id=request_id):
                self._dialer.give_up(request_id, "the request has ended")
            case ShortOfBlocks(short=short):
                self._listener.short_of_blocks(short)


def _pull_events(mailbox: Mailbox[Command]) -> PullEvents:
    return PullEvents(
        arrived=lambda pull: mailbox.put(KvArrived(pull)),
        failed=lambda request_id, why, first_token: mailbox.put(KvFailed(request_id, why, first_token)),
        quiet=lambda request_id: mailbox.put(ReadsEnded(request_id)),
    )


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
