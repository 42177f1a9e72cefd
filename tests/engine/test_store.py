"""The store in which ranks meet: whatever is wrong with --master is one sentence in bounded time."""

from __future__ import annotations

import socket

import pytest

from tandem.engine.store import open_store
from tandem.errors import StartError
from tandem.wire.messages import Address


def test_a_master_that_is_not_there_is_an_error_in_bounded_time() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening
        master = Address("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(StartError, match=r"could not be reached within 0 s .*is node 0 started"):
            open_store(master, 1, 0.3)


def test_a_master_port_that_is_taken_is_an_error_of_node_0() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        master = Address("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(StartError, match="node 0 cannot listen on --master"):
            open_store(master, 0, 1.0)
