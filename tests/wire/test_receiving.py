"""The receive loop outlives every message, and its log stays bounded."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import pytest
import zmq
import zmq.asyncio

from tandem.errors import WireError
from tandem.wire.codec import Codec
from tandem.wire.receiving import BURST, LOGGED_AT_FIRST, LOGGED_EVERY, DroppedMessages, receive_messages
from tandem.wire.sockets import Sockets

SECONDS = 20.0


class Note(msgspec.Struct, frozen=True, tag="note"):
    text: str


CODEC: Codec[Note] = Codec(Note, limit=1000)
GOOD = [CODEC.encode(Note("good"))]
Frames = list[bytes]


@dataclass
class Received:
    dropped: DroppedMessages = field(default_factory=lambda: DroppedMessages(logging.getLogger("test"), "notes"))
    notes: list[tuple[bytes, Note]] = field(default_factory=list)


def receive(*messages: Frames, handle: Callable[[bytes, Note], None] | None = None, routed: bool = True) -> Received:
    """Send messages and then a note "last" to a receive loop; return what it handed on until that one."""
    received = Received()

    async def talk() -> None:
        context = zmq.asyncio.Context()
        last = asyncio.Event()

        def take(sender: bytes, note: Note) -> None:
            received.notes.append((sender, note))
            if note.text == "last":
                last.set()
            elif handle is not None:
                handle(sender, note)

        try:
            sockets = Sockets(context, None)
            listener, port = sockets.bind(zmq.ROUTER if routed else zmq.DEALER, "127.0.0.1", 0)
            client = sockets.connect(zmq.DEALER, "127.0.0.1", port)
            loop = asyncio.create_task(receive_messages(listener, CODEC, take, received.dropped))
            for frames in (*messages, [CODEC.encode(Note("last"))]):
                await client.send_multipart(frames)
            await asyncio.wait_for(last.wait(), SECONDS)
            loop.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await loop
        finally:
            context.destroy(linger=0)

    asyncio.run(talk())
    return received


def texts(received: Received) -> list[str]:
    return [note.text for _, note in received.notes]


def test_a_router_hands_on_messages_with_their_sender() -> None:
    received = receive(GOOD)
    (first, note), (again, _) = received.notes
    assert note == Note("good")
    assert first == again != b""


def test_a_dealer_hands_on_messages_without_a_sender() -> None:
    assert receive(GOOD, routed=False).notes[0] == (b"", Note("good"))


@pytest.mark.parametrize(
    "bad",
    [[b""], [b"garbage"], [b"\xc1" * 2000], [*GOOD, *GOOD], [b"", *GOOD], [msgspec.msgpack.encode({"type": "x"})]],
)
@pytest.mark.parametrize("routed", [True, False])
def test_a_message_that_is_not_of_the_channel_is_counted_and_the_next_one_served(bad: Frames, routed: bool) -> None:
    received = receive(bad, GOOD, bad, routed=routed)
    assert texts(received) == ["good", "last"]
    assert received.dropped.count == 2


def test_a_bug_of_the_handler_is_logged_with_its_traceback_and_the_loop_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(sender: bytes, note: Note) -> None:
        raise KeyError("our own bug")

    received = receive(GOOD, GOOD, handle=broken)
    assert texts(received) == ["good", "good", "last"]
    assert received.dropped.count == 2
    assert "in broken" in caplog.text


def test_a_message_that_the_handler_refuses_is_logged_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(sender: bytes, note: Note) -> None:
        raise WireError("not now")

    assert receive(GOOD, handle=refuse).dropped.count == 1
    (record,) = caplog.records
    assert record.getMessage() == "notes message 1 dropped: not now"
    assert record.exc_info is None


def test_dropped_messages_are_logged_at_first_and_then_one_in_many(caplog: pytest.LogCaptureFixture) -> None:
    dropped = DroppedMessages(logging.getLogger("test"), "notes")
    for _ in range(3 * LOGGED_EVERY):
        dropped.add(WireError("flood"))
    assert dropped.count == 3 * LOGGED_EVERY
    numbers = [*range(1, LOGGED_AT_FIRST + 1), LOGGED_EVERY, 2 * LOGGED_EVERY, 3 * LOGGED_EVERY]
    assert [r.getMessage() for r in caplog.records] == [f"notes message {n} dropped: flood" for n in numbers]


def test_a_sender_that_never_stops_does_not_have_the_event_loop_to_itself() -> None:
    """With one that is served without a pause, nothing else would run until it stopped: here, never."""

    async def talk() -> int:
        context = zmq.asyncio.Context()
        handled = 0
        enough, stop = asyncio.Event(), threading.Event()

        def take(sender: bytes, note: Note) -> None:
            nonlocal handled
            handled += 1
            if handled == 5000:
                enough.set()

        try:
            listener, port = Sockets(context, None).bind(zmq.ROUTER, "127.0.0.1", 0)
            flood = threading.Thread(target=send_until, args=(port, stop))
            flood.start()
            dropped = DroppedMessages(logging.getLogger("test"), "notes")
            loop = asyncio.create_task(receive_messages(listener, CODEC, take, dropped))
            await enough.wait()
            loop.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await loop
        finally:
            stop.set()
            flood.join(SECONDS)
            context.destroy(linger=0)
        return handled

    handled = asyncio.run(asyncio.wait_for(talk(), SECONDS))
    assert 5000 <= handled < 5000 + 100 * BURST


def send_until(port: int, stop: threading.Event) -> None:
    context = zmq.Context()
    client = context.socket(zmq.DEALER)
    client.connect(f"tcp://127.0.0.1:{port}")
    client.sndtimeo = 100
    while not stop.is_set():
        with contextlib.suppress(zmq.Again):
            client.send_multipart(GOOD)
    context.destroy(linger=0)
