"""Text goes through in order, nothing waits for a reader, and what is lost is counted where it is missing."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator
from typing import TextIO

import pytest

from tandem.bounded_writer import BoundedWriter

SECONDS = 10.0


class Held(io.StringIO):
    """A stream that is written to only once it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.released = threading.Event()

    def write(self, text: str) -> int:
        self.entered.set()
        assert self.released.wait(SECONDS)
        return super().write(text)


@pytest.fixture
def pipe() -> Iterator[tuple[int, TextIO]]:
    """A pipe: its end to read from, and a stream into it."""
    end, into = os.pipe()
    with os.fdopen(into, "w") as stream:
        yield end, stream
    os.close(end)


def test_text_goes_through_in_order() -> None:
    stream = io.StringIO()
    writer = BoundedWriter(stream)
    for number in range(100):
        writer.write(f"line {number}\n")
    assert writer.drain(SECONDS)
    assert stream.getvalue() == "".join(f"line {number}\n" for number in range(100))


def test_what_fits_exactly_waits_and_what_does_not_is_dropped_and_counted() -> None:
    stream = Held()
    writer = BoundedWriter(stream, capacity=10)
    writer.write("first\n")
    assert stream.entered.wait(SECONDS), "the thread holds the first line"
    writer.write("12345678\n")
    writer.write("\n")  # ten characters wait
    writer.write("a\nb\n")
    writer.write("c")
    stream.released.set()
    assert writer.drain(SECONDS)
    assert writer.drain(SECONDS)
    writer.write("last\n")
    assert writer.drain(SECONDS)
    notice = "[3 lines dropped: this output is read too slowly]\n"
    assert stream.getvalue() == f"first\n12345678\n\n{notice}last\n"


def test_a_pipe_that_nobody_reads_keeps_nobody_waiting(pipe: tuple[int, TextIO]) -> None:
    end, stream = pipe
    writer = BoundedWriter(stream, capacity=100_000)
    for _ in range(3000):
        writer.write(f"{'x' * 999}\n")  # 3 MB: more than pipe and queue hold
    assert not writer.drain(0.01)
    size, tail = 0, b""
    while b"lines dropped" not in tail:
        writer.drain(0.0)  # what is dropped is told once there is room
        data = os.read(end, 65536)
        size += len(data)
        tail = tail[-100:] + data
    assert size < 1_000_000


def test_an_error_of_the_stream_hurts_nobody() -> None:
    with open("/dev/full", "w") as stream:
        writer = BoundedWriter(stream)
        writer.write("lost\n")
        assert writer.drain(SECONDS)
        writer.write("lost\n")
        assert writer.drain(SECONDS)
