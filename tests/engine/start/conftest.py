"""Stores in which ranks meet."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tandem.engine.store import Store, open_store
from tandem.wire.messages import Address

PATIENCE = 20.0

OpenStore = Callable[[int], Store]


@pytest.fixture(params=["file", "tcp"])
def open_it(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OpenStore]:
    """Opens a rank's connection to one store. Rank 0's, if it serves, lives until the test ends."""
    kept: list[Store] = []
    lock = threading.Lock()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def open_one(rank: int) -> Store:
        if request.param == "file":
            return open_store(str(tmp_path / "meeting"), rank, PATIENCE)
        store = open_store(Address("127.0.0.1", port), rank, PATIENCE)
        with lock:
            kept.append(store)
        return store

    yield open_one
    kept.clear()
