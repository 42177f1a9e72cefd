"""A mailbox can be waited for with sockets, and loses nothing."""

from __future__ import annotations

import select
import threading
from collections.abc import Iterator

import pytest

from tandem.engine.mailbox import Mailbox


@pytest.fixture
def mailbox() -> Iterator[Mailbox[object]]:
    made: Mailbox[object] = Mailbox()
    yield made
    made.close()


def readable(mailbox: Mailbox[object], milliseconds: int = 0) -> bool:
    poll = select.poll()
    poll.register(mailbox.fileno(), select.POLLIN)
    return bool(poll.poll(milliseconds))


def test_it_is_readable_while_something_is_in_it(mailbox: Mailbox[object]) -> None:
    assert not readable(mailbox)
    mailbox.put("a")
    mailbox.put("b")
    assert readable(mailbox)
    assert mailbox.take() == ["a", "b"]
    assert not readable(mailbox)
    assert mailbox.take() == []


def test_who_waits_for_it_is_woken_by_another_thread(mailbox: Mailbox[object]) -> None:
    writer = threading.Thread(target=mailbox.put, args=("a",))
    writer.start()
    assert readable(mailbox, 10_000)
    writer.join()
    assert mailbox.take() == ["a"]


def test_a_reader_that_does_not_come_does_not_stop_the_writers(mailbox: Mailbox[object]) -> None:
    for number in range(100_000):
        mailbox.put(number)
    assert mailbox.take() == list(range(100_000))
    assert not readable(mailbox)
    mailbox.put("more")
    assert readable(mailbox)


def test_many_writers_lose_nothing_and_each_keeps_its_order(mailbox: Mailbox[object]) -> None:
    def write(writer: int) -> None:
        for number in range(500):
            mailbox.put((writer, number))

    writers = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for writer in writers:
        writer.start()
    taken: list[object] = []
    while len(taken) < 2000:
        assert readable(mailbox, 10_000), "something was put, but nobody was woken"
        taken += mailbox.take()
    for writer in writers:
        writer.join()
    for number in range(4):
        assert [item for item in taken if item[0] == number] == [(number, n) for n in range(500)]  # type: ignore[index]
