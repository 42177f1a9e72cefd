"""The shells of both sides over real sockets; transfer threads are played by the test."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from tandem.errors import ConfigError
from tandem.ids import EngineIdentity
from tandem.transfer.decode.dialer import PeerDialer, PullEvents
from tandem.transfer.decode.pull import Pull
from tandem.transfer.prefill.listener import MAX_PEER_MESSAGE, PeerListener
from tandem.transfer.thread.leader_side import TransferThreads
from tandem.transfer.thread.thread_messages import OpenPeer, PeerOpened, ReadEnded, ReadOrder, ToTransferThread
from tandem.wire.codec import Codec
from tandem.wire.messages import Address, Introduce, PeerAddress, PullKv
from tandem.wire.peer_messages import Claim, Envelope, Hello, KvComputed, Release, ToPrefill, Welcome
from tandem.wire.sockets import SocketOptions, Sockets
from tests.transfer.engines import ENVELOPE, descriptor

HOST = "127.0.0.1"
PATIENCE = 20.0
TO_PREFILL: Codec[ToPrefill] = Codec(ToPrefill)

pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def until(happened: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not happened():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


class Prefill:
    """An engine that listens."""

    def __init__(self, context: zmq.asyncio.Context, engine_id: str, incarnation: str, port: int) -> None:
        self.identity = EngineIdentity(engine_id, incarnation)
        self.ended: list[str] = []
        self.corrupt: list[str] = []
        socket, port = Sockets(context, None).bind(zmq.ROUTER, HOST, port, SocketOptions(handover=True))
        self.address = Address(HOST, port)
        described = descriptor(self.identity)
        self.listener = PeerListener(
            socket, self.identity, ENVELOPE, described, 30.0, 1000, self.ended.extend, self.corrupt.extend
        )
        self.task = asyncio.create_task(self.listener.run())

    def offer(self, request_id: str) -> None:
        self.listener.begin(request_id)
        self.listener.chunk(request_id, 0, [5, 6], 8, True, 7)

    def names(self, request_id: str, **fields: Any) -> PullKv:
        plain = PullKv(self.identity.engine_id, self.identity.incarnation, self.address, request_id)
        return msgspec.structs.replace(plain, **fields)

    async def die(self) -> None:
        await asyncio.sleep(0)  # a task that was cancelled before it began closes nothing
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


class FakeTransferThreads(TransferThreads):
    """One rank that connects at once, and ends reads when the test says so."""

    def __init__(self) -> None:
        self.reads: list[ReadOrder] = []
        self.dialer: PeerDialer | None = None

    def order(self, order: ToTransferThread, rank: int | None = None) -> None:
        assert self.dialer is not None
        if isinstance(order, ReadOrder):
            self.reads.append(order)
        elif isinstance(order, OpenPeer):
            asyncio.get_running_loop().call_soon(self.dialer.reported, PeerOpened(0, order.session))


class Decode:
    """An engine that dials."""

    def __init__(self, context: zmq.asyncio.Context, envelope: Envelope = ENVELOPE) -> None:
        identity = EngineIdentity("d0", "d0-incarnation")
        self.arrived: list[Pull] = []
        self.failed: list[tuple[str, str]] = []
        self.quiet: list[str] = []
        events = PullEvents(
            self.arrived.append, lambda request_id, why, _: self.failed.append((request_id, why)), self.quiet.append
        )
        self.transfer_threads = FakeTransferThreads()
        layouts = [rank.layout for rank in descriptor(identity).ranks]
        sockets = Sockets(context, None)
        self.dialer = PeerDialer(identity, envelope, layouts, self.transfer_threads, sockets, events)
        self.transfer_threads.dialer = self.dialer
        self.task = asyncio.create_task(self.dialer.run())

    def introduce(self, *engines: Prefill) -> None:
        self.dialer.introduce(Introduce([PeerAddress(engine.identity, engine.address) for engine in engines]))

    def pull(self, request_id: str, source: PullKv) -> None:
        self.dialer.open(request_id, source)
        self.dialer.allocated(request_id, [0, 1], 0, 8)

    def states(self) -> list[str]:
        return [peer.state for peer in self.dialer.peers]

    async def reads_one(self) -> None:
        reads = self.transfer_threads.reads
        await until(lambda: reads)
        self.dialer.reported(ReadEnded(0, reads.pop().job, 100, 2, 0.01))


class Rig:
    """Makes engines, and ends them."""

    def __init__(self) -> None:
        self.context = zmq.asyncio.Context()
        self.prefills: list[Prefill] = []
        self.decodes: list[Decode] = []

    def prefill(self, engine_id: str = "p0", incarnation: str = "first", port: int = 0) -> Prefill:
        made = Prefill(self.context, engine_id, incarnation, port)
        self.prefills.append(made)
        return made

    def decode(self, envelope: Envelope = ENVELOPE) -> Decode:
        made = Decode(self.context, envelope)
        self.decodes.append(made)
        return made

    async def restart(self, old: Prefill, incarnation: str) -> Prefill:
        """A new incarnation at the address of one that died; libzmq gives that up a moment after the socket closed."""
        made: list[Prefill] = []

        def starts() -> bool:
            try:
                made.append(self.prefill(old.identity.engine_id, incarnation, old.address.port))
            except ConfigError:
                return False
            return True

        await until(starts)
        return made[0]


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    made = Rig()
    yield made
    tasks = [prefill.task for prefill in made.prefills] + [decode.task for decode in made.decodes]
    broken = [task.exception() for task in tasks if task.done() and not task.cancelled()]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    made.context.destroy(linger=0)
    assert not broken, broken


async def works(rig: Rig, decode: Decode) -> None:
    """KV goes from a new prefill engine to this decode engine."""
    prefill = rig.prefill("another")
    prefill.offer("t")
    decode.pull("t", prefill.names("t"))
    await decode.reads_one()
    assert [pull.request_id for pull in decode.arrived] == ["t"]
    await until(lambda: prefill.ended == ["t"])


async def test_kv_is_claimed_read_and_released(rig: Rig) -> None:
    prefill, decode = rig.prefill(), rig.decode()
    decode.introduce(prefill)
    await until(lambda: decode.states() == ["ready"])
    decode.pull("r", prefill.names("theirs"))
    prefill.listener.begin("theirs")
    prefill.listener.chunk("theirs", 0, [5], 4, False, None)
    await decode.reads_one()
    prefill.listener.chunk("theirs", 1, [6], 8, True, 9)
    await decode.reads_one()
    [pull] = decode.arrived
    assert (pull.request_id, pull.first_token, pull.bytes, pull.descriptors) == ("r", 9, 200, 4)
    await until(lambda: prefill.ended == ["theirs"])
    assert not prefill.listener.knows("theirs")
    assert (decode.failed, decode.quiet) == ([], [])


async def test_a_refusal_names_both_values_on_both_sides(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    prefill, decode = rig.prefill(), rig.decode(msgspec.structs.replace(ENVELOPE, kv_dtype="bfloat16"))
    decode.pull("r", prefill.names("r"))
    await until(lambda: decode.quiet)
    assert decode.failed == [("r", "kv_dtype differs: ours is bfloat16, theirs is float32")]
    assert decode.states() == ["refused"]
    assert "kv_dtype differs: ours is float32, theirs is bfloat16" in caplog.text  # the listener's words


async def test_a_session_that_ended_leaves_no_task_behind(rig: Rig) -> None:
    first, decode = rig.prefill(), rig.decode()
    before = asyncio.all_tasks()
    decode.introduce(first)
    await until(lambda: decode.states() == ["ready"])
    await first.die()
    second = await rig.restart(first, "second")
    decode.pull("r", first.names("r"))
    await until(lambda: decode.states() == ["lost"])
    assert "restarted" in decode.failed[0][1]
    await second.die()
    await until(lambda: asyncio.all_tasks() <= before)


async def test_an_address_that_may_not_be_called_costs_only_that_pull(rig: Rig) -> None:
    """Off loopback nothing is connected to without a key."""
    prefill, decode = rig.prefill(), rig.decode()
    decode.pull("r", prefill.names("r", address=Address("192.0.2.7", 7001), foreign=True))
    assert "without a cluster key" in decode.failed[0][1]
    assert decode.quiet == ["r"]
    await works(rig, decode)


async def test_a_peer_that_talks_nonsense_instead_of_a_welcome_is_lost_and_nothing_else(rig: Rig) -> None:
    socket, port = Sockets(rig.context, None).bind(zmq.ROUTER, HOST, 0)
    prefill, decode = rig.prefill(), rig.decode()
    began = time.monotonic()
    decode.pull("r", prefill.names("r", address=Address(HOST, port)))
    client, _ = await socket.recv_multipart()
    await socket.send_multipart([client, b"\xc1"])
    await until(lambda: decode.quiet)
    assert time.monotonic() - began < 5.0, "it waited for a welcome"
    assert "p0" in decode.failed[0][1]
    socket.close()
    await works(rig, decode)


async def test_what_cannot_be_read_later_is_dropped_and_the_session_lives(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    socket, port = Sockets(rig.context, None).bind(zmq.ROUTER, HOST, 0)
    played, decode = EngineIdentity("p0", "first"), rig.decode()
    described = msgspec.Raw(msgspec.msgpack.encode(descriptor(played)))
    decode.dialer.introduce(Introduce([PeerAddress(played, Address(HOST, port))]))
    client, _ = await socket.recv_multipart()
    await socket.send_multipart([client, TO_PREFILL.encode(Welcome(ENVELOPE, played, 30.0, described))])
    await socket.send_multipart([client, b"\xc1"])
    await until(lambda: "dropped" in caplog.text)
    await until(lambda: decode.states() == ["ready"])
    socket.close()


@pytest.mark.parametrize("method", ["received", "tick"])
async def test_an_error_of_our_own_ends_the_session_with_a_line_in_the_log(
    rig: Rig, method: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prefill, decode = rig.prefill(), rig.decode()
    decode.pull("r", prefill.names("r"))
    await until(lambda: decode.states() == ["ready"])

    def breaks(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(f"tandem.transfer.decode.pulls.Pulls.{method}", breaks)
    prefill.offer("r")
    await until(lambda: decode.failed)
    monkeypatch.undo()
    assert decode.failed == [("r", f"p0 at {prefill.address}: a bug")]
    assert "RuntimeError: a bug" in caplog.text
    assert decode.states() == ["lost"]
    decode.transfer_threads.reads.clear()
    await works(rig, decode)


# --- hostile peers of a prefill engine -----------------------------------------------------------------------------


async def test_bad_messages_are_counted_and_dropped_and_the_listener_lives(rig: Rig) -> None:
    prefill, decode = rig.prefill(), rig.decode()
    socket = Sockets(rig.context, None).connect(zmq.DEALER, HOST, prefill.address.port)
    bad: list[list[bytes]] = [
        [b""],
        [b"\xc1"],
        [b"\xdf\xff\xff\xff\xff"],
        [b"\x82\xa1z" + b"\x91" * 50_000],
        [b"", TO_PREFILL.encode(Claim("first", "r"))],
        [TO_PREFILL.encode(Claim("", "r"))],
        [TO_PREFILL.encode(KvComputed("first", "r", 0, [1], 4, True))],
        [bytes(MAX_PEER_MESSAGE + 1)],
    ]
    for frames in bad:
        await socket.send_multipart(frames)
    await until(lambda: prefill.listener.bad_messages == len(bad))
    prefill.offer("r")
    decode.pull("r", prefill.names("r"))
    await decode.reads_one()
    assert len(decode.arrived) == 1
    socket.close()


async def test_messages_out_of_order_are_answered_and_change_nothing(rig: Rig) -> None:
    prefill = rig.prefill()
    socket = Sockets(rig.context, None).connect(zmq.DEALER, HOST, prefill.address.port)

    async def ask(message: ToPrefill) -> Any:
        await socket.send(TO_PREFILL.encode(message))
        async with asyncio.timeout(PATIENCE):
            return msgspec.msgpack.decode(await socket.recv())["type"]

    assert await ask(Claim("another", "r")) == "refused"
    await socket.send(TO_PREFILL.encode(Release("first", ["never claimed"])))
    hello = Hello(ENVELOPE, EngineIdentity("d0", "x"), "p0")
    assert await ask(hello) == "welcome"
    assert await ask(hello) == "welcome"
    assert await ask(Claim("first", "never claimed", early=False)) == "kv_gone"
    assert prefill.listener.bad_messages == 0
    socket.close()
