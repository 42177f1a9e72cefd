from __future__ import annotations

import socket

import pytest

from tandem.errors import ConfigError
from tandem.wire.addresses import endpoint, is_loopback, local_address_towards, resolve


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "::1", "[::1]", "::ffff:127.0.0.1"])
def test_these_stay_on_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "", "*", "::", "10.0.0.1", "192.0.2.1", "::ffff:10.0.0.1", "no-such-host.invalid"]
)
def test_these_may_leave_this_machine(host: str) -> None:
    assert not is_loopback(host)


def test_a_name_with_both_kinds_of_address_gives_the_ipv4_one(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fe80::1%eth0", 0, 0, 2)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.7", 0)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    assert str(resolve("both.example")) == "192.0.2.7"
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both[:1])
    assert str(resolve("only6.example")) == "fe80::1"


def test_an_unknown_name_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="no-such-host"):
        resolve("no-such-host.invalid")


def test_our_address_towards_loopback_is_loopback() -> None:
    assert local_address_towards("127.0.0.1", 8000) == "127.0.0.1"
    assert local_address_towards("localhost", 0) == "127.0.0.1"


def test_no_route_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="no route"):
        local_address_towards("240.0.0.1" if not _routed("240.0.0.1") else "255.255.255.255", 8000)


def _routed(host: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        return probe.connect_ex((host, 9)) == 0


def test_ipv6_addresses_get_brackets() -> None:
    assert [endpoint(host, 80) for host in ("h", "1.2.3.4", "::1", "[::1]")] == [
        "h:80",
        "1.2.3.4:80",
        "[::1]:80",
        "[::1]:80",
    ]
