"""Log lines of a child: written whole or dropped, never waited for."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

from tandem.logs import DescriptorHandler


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    end, into = os.pipe()
    os.set_blocking(into, False)
    os.set_blocking(end, False)
    yield end, into
    os.close(end)
    os.close(into)


def record(text: str) -> logging.LogRecord:
    return logging.LogRecord("test", logging.INFO, "", 0, text, None, None)


def everything(end: int) -> str:
    found = b""
    try:
        while data := os.read(end, 65536):
            found += data
    except BlockingIOError:
        pass
    return found.decode()


def test_what_a_full_pipe_does_not_take_is_dropped_and_counted_at_the_next_line(pipe: tuple[int, int]) -> None:
    end, into = pipe
    handler = DescriptorHandler(into)
    for number in range(1000):
        handler.emit(record(f"{number:04} {'x' * 990}"))  # 1 MB into 64 kB
    before = everything(end).splitlines()
    assert before == [f"{number:04} {'x' * 990}" for number in range(len(before))]
    assert 0 < len(before) < 1000
    handler.emit(record("after"))
    handler.emit(record("and on"))
    dropped = 1000 - len(before)
    assert everything(end) == f"{dropped} log lines dropped: they are read too slowly\nafter\nand on\n"


def test_a_line_that_is_cut_does_not_run_into_the_next_one(pipe: tuple[int, int]) -> None:
    end, into = pipe
    handler = DescriptorHandler(into)
    handler.emit(record("x" * 1_000_000))
    cut = everything(end)
    assert set(cut) == {"x"}
    handler.emit(record("whole"))
    assert everything(end) == "\nwhole\n"


def test_a_disk_that_is_full_stops_nobody() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    DescriptorHandler(full).emit(record("lost"))
    os.close(full)
