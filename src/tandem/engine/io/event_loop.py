"""The leader's event loop: frontends, peers and transfer threads, beside and never on the step loop."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import zmq
import zmq.asyncio

from tandem.config import EngineConfig
from tandem.engine import commands
from tandem.engine.commands import Command
from tandem.engine.io.frontends import Frontend, FrontendEvents
from tandem.engine.mailbox import Mailbox
from tandem.errors import EngineFailed, InvalidRequest
from tandem.ids import prompt_digest
from tandem.scheduling.events import BlocksAllocated, ChunkComputed, PrefillEnded, PullEnded
from tandem.transfer.decode.dialer import PeerDialer, PullEvents
from tandem.transfer.handshake import EngineDescriptor
from tandem.transfer.prefill.listener import PeerListener
from tandem.transfer.thread.leader_side import TransferThreads
from tandem.wire.messages import Address, Failed, Generate, Introduce, Local, Prefill, PullKv, Register, Tokens
from tandem.wire.peer_messages import Envelope
from tandem.wire.sockets import Sockets

log = logging.getLogger(__name__)

PUBLISHED_PATIENCE = 60.0
"""Seconds for which KV that was published to a foreign proxy waits for its decode engine."""

KvEvent = ChunkComputed | PrefillEnded | BlocksAllocated | PullEnded


@dataclass(frozen=True, slots=True)
class Wiring:
    """What the leader has bound and found out before the event loop starts. `register` may be called at any time."""

    config: EngineConfig
    descriptor: EngineDescriptor
    envelope: Envelope
    frontends: Sequence[Address]
    context: zmq.asyncio.Context
    sockets: Sockets[zmq.asyncio.Socket]
    peer_socket: zmq.asyncio.Socket
    transfer_socket: zmq.asyncio.Socket
    register: Callable[[], Register]


class LeaderEventLoop:
    """Owns the event loop's thread. Other threads call `post_*`; what comes in goes to the mailbox.

    Args:
        end_process: ends this process, with the reason, when the step loop hangs and cannot.
    """

    def __init__(self, wiring: Wiring, mailbox: Mailbox[Command], end_process: Callable[[str], None]) -> None:
        self._wiring = wiring
        self._mailbox = mailbox
        self._end_process = end_process
        self._step_loop_ended = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._frontends: list[Frontend] = []
        self._started = threading.Event()
        self._stopping: asyncio.Event | None = None
        self._farewell = ""
        self._thread = threading.Thread(target=self._main, name="event_loop", daemon=True)
        self.listener: PeerListener | None = None
        self.dialer: PeerDialer | None = None

    def start(self, check_ranks: Callable[[], object], seconds: float) -> None:
        """Returns once all transfer threads are there and the frontends are being called.

        Args:
            check_ranks: raises EngineFailed when a rank is lost; called again and again meanwhile.
        """
        self._thread.start()
        deadline = time.monotonic() + seconds
        while not self._started.wait(0.1):
            check_ranks()
            if not self._thread.is_alive():
                raise RuntimeError("the event loop did not start")
            if time.monotonic() > deadline:
                raise EngineFailed(f"the transfer threads of the ranks were not ready within {seconds:.0f} s")

    def stop(self, reason: str) -> None:
        """Say goodbye and end the thread; bounded."""

        def ask() -> None:
            self._farewell = reason
            if self._stopping is not None:
                self._stopping.set()

        self._step_loop_ended.set()
        self._call(ask)
        self._thread.join(2.0)

    def post_outputs(self, outputs: dict[int, list[Tokens | Failed]]) -> None:
        def send() -> None:
            for frontend, items in outputs.items():
                self._frontends[frontend].send(items)

        self._call(send)

    def post_kv(self, events: list[KvEvent]) -> None:
        def handle() -> None:
            for event in events:
                self._kv_event(event)

        self._call(handle)

    def _call(self, action: Callable[[], Any]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(action)

    # --- the thread ----------------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            self._loop.run_until_complete(self._run())
            self._mailbox.put(commands.Shutdown("the event loop has ended"))
        except EngineFailed as error:
            self._fail(str(error))
        except BaseException as error:
            log.exception("the leader's event loop died")
            self._fail(f"the event loop died: {error}")
        finally:
            self._loop.close()

    def _fail(self, reason: str) -> None:
        self._mailbox.put(commands.Shutdown(reason, failed=True))
        if not self._step_loop_ended.wait(commands.STUCK_SECONDS):
            self._end_process(reason)

    async def _run(self) -> None:
        wiring = self._wiring
        self._stopping = asyncio.Event()
        transfer_threads = TransferThreads(wiring.transfer_socket, len(wiring.descriptor.ranks))
        self.dialer = PeerDialer(
            wiring.descriptor.identity,
            wiring.envelope,
            [rank.layout for rank in wiring.descriptor.ranks],
            transfer_threads,
            wiring.sockets,
            PullEvents(
                arrived=lambda pull: self._mailbox.put(commands.KvArrived(pull)),
                failed=lambda request_id, why: self._mailbox.put(commands.KvFailed(request_id, why)),
                quiet=lambda request_id: self._mailbox.put(commands.ReadsEnded(request_id)),
            ),
        )
        self.listener = PeerListener(
            wiring.peer_socket,
            wiring.descriptor.identity,
            wiring.envelope,
            wiring.descriptor,
            wiring.config.time.lease_ttl,
            on_ended=lambda ids: self._mailbox.put(commands.LeasesEnded(ids)),
        )
        tasks = [
            asyncio.create_task(coroutine)
            for coroutine in (
                transfer_threads.run(self.dialer.reported),
                transfer_threads.watch(),
                self.listener.run(),
                self.dialer.run(),
                self._serve_frontends(transfer_threads),
            )
        ]
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            done, _ = await asyncio.wait([*tasks, stopping], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for frontend in self._frontends:
                frontend.goodbye(self._farewell or "it failed")
            transfer_threads.stop()
            self.dialer.close()
            await _cancel([*tasks, stopping])
            wiring.transfer_socket.close(linger=500)

    async def _serve_frontends(self, transfer_threads: TransferThreads) -> None:
        await transfer_threads.ready.wait()
        for number, address in enumerate(self._wiring.frontends):
            events = FrontendEvents(self._handler(number), self._abort, self._introduce)
            self._frontends.append(
                Frontend(
                    address,
                    self._wiring.sockets,
                    self._wiring.descriptor.identity.incarnation,
                    self._wiring.register,
                    events,
                )
            )
        self._started.set()
        async with asyncio.TaskGroup() as group:
            for frontend in self._frontends:
                group.create_task(frontend.run())

    def _handler(self, number: int) -> Callable[[Frontend, Generate], None]:
        def generate(frontend: Frontend, message: Generate) -> None:
            try:
                self._begin(number, message)
            except InvalidRequest as error:
                frontend.send([Failed(message.request_id, error.code, str(error), error.param)])

        return generate

    def _begin(self, frontend: int, message: Generate) -> None:
        """Raises InvalidRequest, and then nothing has begun."""
        assert self.listener is not None
        assert self.dialer is not None
        request_id, kv = message.request_id, message.kv
        if self.listener.knows(request_id) or self.dialer.knows(request_id):
            raise InvalidRequest(f"request id {request_id} is in use; every request needs its own", param="request_id")
        if isinstance(kv, PullKv) and kv.foreign and not self._wiring.config.access.allows(kv.address.host):
            raise InvalidRequest(
                f"remote_host {kv.address.host} is not within this engine's --allow-peers", param="kv_transfer_params"
            )
        start = commands.StartRequest(frontend, message)
        match kv:
            case PullKv():
                self._mailbox.put(start)
                self.dialer.open(request_id, kv, prompt_digest(message.token_ids))
            case Prefill(published=published):
                wait = PUBLISHED_PATIENCE if published else None
                self.listener.begin(request_id, wait, prompt_digest(message.token_ids))
                self._mailbox.put(start)
            case Local():
                self._mailbox.put(start)

    def _abort(self, request_id: str) -> None:
        self._mailbox.put(commands.AbortRequest(request_id))

    def _introduce(self, message: Introduce) -> None:
        assert self.dialer is not None
        self.dialer.introduce(message)

    def _kv_event(self, event: KvEvent) -> None:
        assert self.listener is not None
        assert self.dialer is not None
        match event:
            case ChunkComputed():
                self.listener.chunk(
                    event.request_id, event.first_block, event.block_ids, event.num_tokens, event.final, event.token
                )
            case PrefillEnded(request_id=request_id, ok=ok):
                if not ok:
                    self.listener.abort(request_id, "the prefill ended early")
            case BlocksAllocated():
                self.dialer.allocated(event.request_id, event.block_ids, event.num_cached_tokens, event.num_tokens)
            case PullEnded(request_id=request_id):
                self.dialer.give_up(request_id, "the request has ended")


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
