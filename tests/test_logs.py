"""Log lines of a child: written whole or dropped, never waited for."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator

import pytest

from tandem.logs import MOST_LINES, STRETCH_SECONDS, DescriptorHandler, LogBound


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    end, into = os.pipe()
    os.set_blocking(into, False)
    os.set_blocking(end, False)
    yield end, into
    os.close(end)
    os.close(into)


def record(text: str, *args: object, level: int = logging.INFO) -> logging.LogRecord:
    return logging.LogRecord("test", level, "", 0, text, args, None)


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
        handler.emit(record(f"{number:04} {'x' * 990}"))  # 1 MB into 64 kB, each a kind of its own
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


def test_a_flood_of_one_kind_of_line_is_cut_and_counted_and_other_lines_come_through(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    end, into = pipe
    handler = DescriptorHandler(into)
    for number in range(6900):
        handler.emit(record("request %d failed", number, level=logging.WARNING))
    handler.emit(record("another", level=logging.WARNING))
    for number in range(100):
        handler.emit(record("request %d", number))
    lines = everything(end).splitlines()
    assert lines[: MOST_LINES + 1] == [*(f"request {number} failed" for number in range(MOST_LINES)), "another"]
    assert len(lines) == MOST_LINES + 1 + 100, "what tells of work is bounded far above"
    now += STRETCH_SECONDS
    handler.emit(record("request %d failed", 7000, level=logging.WARNING))
    left_out = 6900 - MOST_LINES
    assert everything(end) == (
        f"{left_out} log lines left out: there were too many of their kind\nrequest 7000 failed\n"
    )


def test_at_most_so_many_of_each_kind_in_a_stretch() -> None:
    bound = LogBound(3, 10.0)
    assert [bound.admit("a", 0.0) for _ in range(5)] == [True, True, True, False, False]
    assert [bound.admit("b", 1.0) for _ in range(3)] == [True, True, True]
    assert bound.ended(9.9) == 0
    assert not bound.admit("a", 9.9)
    assert bound.ended(10.0) == 3
    assert bound.admit("a", 10.0)
    assert not bound.admit("b", 10.5)
    assert bound.ended(11.0) == 1


def test_what_was_left_out_is_told_once_and_nothing_is_kept_of_kinds_that_are_over() -> None:
    bound = LogBound(1, 1.0)
    for kind in range(100):
        bound.admit(kind, 0.0)
        bound.admit(kind, 0.0)
    assert bound.ended(1.0) == 100
    assert bound.ended(1.0) == 0
    assert not bound._windows
