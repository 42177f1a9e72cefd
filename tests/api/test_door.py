"""Each limit of the door, at its end and beyond it; whatever a request took goes with it."""

import pytest

from tandem.api.connections import Connections, client_of
from tandem.api.door import Door
from tandem.api.http_errors import TooManyRequests
from tandem.config_limits import LimitsSection
from tandem.errors import ConfigError, Overloaded


def test_open_requests_have_a_limit() -> None:
    door = Door(LimitsSection(max_requests=2))
    refused = pytest.raises(Overloaded, match="2 requests are open, which is --max-requests")
    with door.request("a"), door.request("b"), refused, door.request("c"):
        pass
    with door.request("c"):
        pass


def test_each_client_has_a_limit_of_its_own() -> None:
    door = Door(LimitsSection(max_requests=10, max_client_requests=1))
    with door.request("a"):
        with pytest.raises(TooManyRequests, match="--max-client-requests"), door.request("a"):
            pass
        with door.request("b"):
            pass
    with door.request("a"):
        pass


def test_bytes_of_all_bodies_have_a_limit() -> None:
    door = Door(LimitsSection(max_body=100, max_body_memory=100))
    with door.request("a") as first, door.request("b") as second:
        first.take_bytes(60)
        second.take_bytes(40)
        with pytest.raises(Overloaded, match="--max-body-memory is 100"):
            second.take_bytes(1)
    with door.request("a") as third:
        third.take_bytes(100)


def test_choices_of_all_requests_have_a_limit() -> None:
    door = Door(LimitsSection(max_choices=8, max_open_choices=8))
    with door.request("a") as first, door.request("b") as second:
        first.take_choices(7)
        second.take_choices(1)
        with pytest.raises(Overloaded, match="--max-open-choices is 8"):
            second.take_choices(1)
    with door.request("a") as third:
        third.take_choices(8)


def test_what_is_refused_is_not_counted() -> None:
    door = Door(LimitsSection(max_requests=1, max_body=10, max_body_memory=10))
    for _ in range(2):
        with door.request("a") as admission:
            admission.take_bytes(10)
            with pytest.raises(Overloaded):
                admission.take_bytes(1)


def test_connections_have_a_limit_in_all_and_for_each_client() -> None:
    connections = Connections(LimitsSection(max_connections=3, max_client_connections=2))
    for client in ("a", "a", "b"):
        connections.opened()
        connections.admit(client)
    with pytest.raises(Overloaded, match="--max-connections"):
        connections.admit("c")
    connections.closed("b")
    with pytest.raises(Overloaded, match="a has 2 open connections, which is --max-client-connections"):
        connections.admit("a")
    connections.admit("c")
    assert not connections.none_open.is_set()
    for client in ("a", "a", "c"):
        connections.closed(client)


def test_none_are_open_once_all_are_closed() -> None:
    connections = Connections(LimitsSection())
    assert [connections.opened(), connections.opened()] == [1, 2]
    connections.closed(None)
    assert not connections.none_open.is_set()
    connections.closed(None)
    assert connections.none_open.is_set()


@pytest.mark.parametrize(
    ("host", "client"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8::1:2:3:4", "2001:db8::/64"),
        ("2001:db8::5", "2001:db8::/64"),
        ("", ""),
        ("unix", "unix"),
    ],
)
def test_an_ipv6_network_is_one_client(host: str, client: str) -> None:
    assert client_of(host) == client


@pytest.mark.parametrize(
    ("limits", "part"),
    [
        ({"max_requests": 0}, "--max-requests must be at least 1"),
        ({"max_client_requests": 0}, "--max-client-requests must be greater than 0"),
        ({"max_head": 1023}, "--max-head must be at least 1024"),
        ({"max_body": 11, "max_body_memory": 10}, r"--max-body-memory \(10\) must not be less than --max-body \(11\)"),
        ({"max_choices": 11, "max_open_choices": 10}, r"--max-open-choices \(10\) must not be less"),
        ({"write_timeout": 0}, "--write-timeout must be greater than 0"),
    ],
)
def test_limits_that_cannot_work_are_refused(limits: dict[str, int], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        LimitsSection(**limits)
