"""Values that nodes exchange through a store."""

from __future__ import annotations

import itertools
from datetime import timedelta

import pytest
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]  # public, but not in __all__

from tandem.doctor.store_exchange import StoreExchange
from tandem.errors import StartError


def test_values_come_by_node_whoever_put_them_first() -> None:
    store = HashStore()
    StoreExchange(store, 1, 2).put("ports/1", [5, 6])
    assert StoreExchange(store, 0, 2).gather("ports", [4], list[int], 1.0) == [[4], [5, 6]]


def test_a_node_that_says_nothing_is_named() -> None:
    with pytest.raises(StartError, match="node 1 fell silent"):
        StoreExchange(HashStore(), 0, 2).gather("pings", [], list[int], 0.01)


def test_something_else_may_be_done_while_a_value_does_not_come() -> None:
    exchange, turns = StoreExchange(HashStore(), 0, 2), itertools.count()

    def meanwhile() -> None:
        if next(turns) == 3:
            exchange.put("key", "value")

    assert exchange.get("key", str, 10.0, meanwhile) == "value"
    assert next(turns) >= 4


def test_the_loss_of_node_0_is_an_error_that_says_so() -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    client = TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=5))
    exchange = StoreExchange(client, 1, 2)
    del server
    with pytest.raises(StartError, match="node 0 was lost"):
        exchange.get("key", str, 10.0)
