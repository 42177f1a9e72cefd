"""The leader's side of a frontend, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest
import zmq
import zmq.asyncio

from tandem.engine.io import frontends
from tandem.engine.io.frontends import Frontend, FrontendEvents
from tandem.errors import InvalidRequest
from tandem.ids import EngineIdentity
from tandem.wire.codec import Codec
from tandem.wire.control_messages import ChangeRole, EngineControl
from tandem.wire.engine_status import EngineStatus
from tandem.wire.messages import Address, Failed, Generate, Goodbye, Outputs, Register, Registered, ToFrontend
from tandem.wire.sampling import SamplingParams
from tandem.wire.sockets import SocketOptions, Sockets
from tests.support.registrations import make_register

WHO = EngineIdentity("engine", "life")
SECONDS = 10


class FakeFrontend:
    """A frontend that can go away and come back at the same port."""

    def __init__(self, sockets: Sockets[zmq.asyncio.Socket], port: int = 0) -> None:
        self._socket, self.port = sockets.bind(zmq.ROUTER, "127.0.0.1", port, SocketOptions(handover=True))
        self._heard: Codec[ToFrontend] = Codec(ToFrontend)

    async def receive(self) -> ToFrontend:
        _, data = await self._socket.recv_multipart()
        return self._heard.decode(data)

    async def registration(self) -> Register:
        while not isinstance(message := await self.receive(), Register):
            pass
        return message

    def send(self, message: object) -> None:
        self._socket.send_multipart([WHO.incarnation.encode(), msgspec.msgpack.encode(message)])

    def close(self) -> None:
        self._socket.close(linger=0)


def nothing(_: object = None) -> None:
    pass


def events_of(
    generate: Callable[[Generate], None] = nothing,
    *,
    abort: Callable[[str], None] = nothing,
    control: Callable[[EngineControl], None] = nothing,
    lost: Callable[[], None] = nothing,
) -> FrontendEvents:
    return FrontendEvents(generate, abort, nothing, control, lost)


@asynccontextmanager
async def connected(
    events: FrontendEvents, registration: Callable[[], Register] = lambda: make_register(WHO, "mixed")
) -> AsyncIterator[tuple[FakeFrontend, Frontend]]:
    """A frontend, and an engine's connection to it that runs."""
    context = zmq.asyncio.Context()
    sockets: Sockets[zmq.asyncio.Socket] = Sockets(context, None)
    there = FakeFrontend(sockets)
    address = Address("127.0.0.1", there.port)
    frontend = Frontend(address, sockets, WHO.incarnation, registration, events)
    running = asyncio.create_task(frontend.run())
    try:
        yield there, frontend
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        there.close()
        context.destroy(linger=0)


def request(request_id: str) -> Generate:
    return Generate(request_id, [1, 2], 2, SamplingParams(max_tokens=4), 60.0)


def test_when_the_connection_breaks_requests_are_given_up_and_the_frontend_is_told() -> None:
    """What was on its way is lost, and neither side could know."""

    async def play() -> None:
        context = zmq.asyncio.Context()
        sockets: Sockets[zmq.asyncio.Socket] = Sockets(context, None)
        before = FakeFrontend(sockets)
        begun: asyncio.Queue[str] = asyncio.Queue()
        aborted: asyncio.Queue[str] = asyncio.Queue()
        events = events_of(lambda generate: begun.put_nowait(generate.request_id), abort=aborted.put_nowait)
        frontend = Frontend(
            Address("127.0.0.1", before.port), sockets, WHO.incarnation, lambda: make_register(WHO, "mixed"), events
        )
        running = asyncio.create_task(frontend.run())
        assert (await before.registration()).connection == 0
        before.send(Registered(True, 0))
        before.send(request("r"))
        assert await begun.get() == "r"
        assert isinstance(await before.receive(), Register | EngineStatus)
        before.close()
        assert await aborted.get() == "r"
        after = FakeFrontend(sockets, before.port)
        after.send(Registered(True, 0))  # to something from before the break: it does not make the frontend know of it
        assert (await after.registration()).connection == 1
        after.send(Registered(True, 1))
        while not isinstance(await after.receive(), EngineStatus):
            pass
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        after.close()
        context.destroy(linger=0)

    asyncio.run(asyncio.wait_for(play(), SECONDS))


def test_an_engine_leaves_once_its_goodbye_has_been_received_and_registers_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process that ends takes along what it has not sent yet: the last tokens of requests that it has finished."""
    monkeypatch.setattr(frontends, "GOODBYE_SECONDS", 3600.0)

    async def play() -> None:
        async with connected(events_of()) as (there, frontend):
            await there.registration()
            there.send(Registered(True, 0))
            while not isinstance(await there.receive(), EngineStatus):
                pass
            frontend.send([Failed("r", "internal_error", "no")])
            leaving = asyncio.create_task(frontend.leave("it was told to", failed=False))
            kinds = []
            while Goodbye not in kinds:
                kinds.append(type(await there.receive()))
                assert not leaving.done()
            assert kinds[-2:] == [Outputs, Goodbye]
            there.send(Registered(True, 0))  # to an earlier heartbeat
            there.send(Registered(False))
            await leaving
            frontend.send([Failed("last", "internal_error", "no")])
            assert isinstance(await there.receive(), Outputs), "no heartbeat, no registration"

    asyncio.run(asyncio.wait_for(play(), SECONDS))


@pytest.mark.parametrize("known", [False, True])
def test_an_engine_does_not_wait_to_leave_a_frontend_that_is_not_there(
    known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frontends, "GOODBYE_SECONDS", 3600.0)

    async def play() -> None:
        async with connected(events_of()) as (there, frontend):
            await there.registration()
            if known:
                there.send(Registered(True, 0))
                while not isinstance(await there.receive(), EngineStatus):
                    pass
            leaving = asyncio.create_task(frontend.leave("it was told to", failed=False))
            if known:
                while not isinstance(await there.receive(), Goodbye):
                    pass
            there.close()
            await leaving

    asyncio.run(asyncio.wait_for(play(), SECONDS))


def test_a_request_that_cannot_be_begun_ends_with_an_error_whoever_is_at_fault() -> None:
    async def play() -> None:
        def fail(generate: Generate) -> None:
            raise OSError("too many open files")

        async with connected(events_of(fail)) as (fake, _):
            await fake.registration()
            fake.send(Registered(True, 0))
            fake.send(request("r"))
            while not isinstance(message := await fake.receive(), Outputs):
                pass
            [failed] = message.items
            assert isinstance(failed, Failed)
            assert (failed.request_id, failed.code) == ("r", "internal_error")

    asyncio.run(asyncio.wait_for(play(), SECONDS))


def test_only_the_answer_to_the_last_registration_counts() -> None:
    async def play() -> None:
        async with connected(events_of()) as (there, _):
            for _ in range(3):
                assert isinstance(await there.receive(), Register)
                there.send(Registered(True, 7))

    asyncio.run(asyncio.wait_for(play(), SECONDS))


def test_a_request_that_cannot_begin_has_an_outcome_and_the_next_one_is_served() -> None:
    """Whatever is raised for it, by an error of our own too."""
    errors = {"bad": InvalidRequest("no", param="prompt"), "bug": RuntimeError("a bug")}
    begun: list[str] = []

    def begin(generate: Generate) -> None:
        if (error := errors.get(generate.request_id)) is not None:
            raise error
        begun.append(generate.request_id)

    async def play() -> list[Failed]:
        async with connected(events_of(begin)) as (there, _):
            await there.registration()
            failed: list[Failed] = []
            for request_id in ("bad", "bug", "good"):
                there.send(request(request_id))
            while len(failed) < 2:
                if isinstance(message := await there.receive(), Outputs):
                    failed += [item for item in message.items if isinstance(item, Failed)]
            while not begun:
                await there.receive()
        return failed

    failed = asyncio.run(asyncio.wait_for(play(), SECONDS))
    assert [(one.request_id, one.code, one.param) for one in failed] == [
        ("bad", "invalid_request", "prompt"),
        ("bug", "internal_error", None),
    ]
    assert begun == ["good"]


def test_what_the_engine_is_told_is_answered_with_a_heartbeat_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The router waits for it."""
    monkeypatch.setattr(frontends, "BEAT_SECONDS", 3600.0)
    status = make_register(WHO, "mixed")

    def obey(message: EngineControl) -> None:
        nonlocal status
        assert isinstance(message, ChangeRole)
        status = make_register(WHO, message.role)

    async def play() -> EngineStatus:
        async with connected(events_of(control=obey), lambda: status) as (there, _):
            await there.registration()
            there.send(Registered(True, 0))
            there.send(ChangeRole("decode"))
            beat = await there.receive()
        assert isinstance(beat, EngineStatus)
        return beat

    assert asyncio.run(asyncio.wait_for(play(), SECONDS)).role == "decode"
