"""Where an engine's own API listens, and what is said of an API that anyone may use."""

import logging
import socket
from contextlib import closing

import pytest

from tandem.api.api_keys import ApiKeys
from tandem.config import EngineConfig, NetworkSection
from tandem.config_access import HttpSection
from tandem.engine.start.launch import api_host
from tandem.router.process import warn_if_open

KEY = HttpSection(api_key="sesame")


@pytest.mark.parametrize(
    ("network", "http", "listens"),
    [
        (NetworkSection(), HttpSection(), "127.0.0.1"),
        (NetworkSection(host="10.0.0.7"), HttpSection(), "127.0.0.1"),
        (NetworkSection(host="10.0.0.7"), KEY, "10.0.0.7"),
        (NetworkSection(), KEY, "10.0.0.5"),
        (NetworkSection(api_host="0.0.0.0"), HttpSection(), "0.0.0.0"),
        (NetworkSection(host="10.0.0.7", api_host="127.0.0.1"), KEY, "127.0.0.1"),
    ],
)
def test_the_api_leaves_loopback_only_with_a_key_or_when_told_to(
    network: NetworkSection, http: HttpSection, listens: str
) -> None:
    assert api_host(EngineConfig(network=network, http=http), "10.0.0.5") == listens


@pytest.mark.parametrize(
    ("host", "keys", "warned"),
    [("127.0.0.1", None, False), ("0.0.0.0", None, True), ("0.0.0.0", ApiKeys("sesame"), False)],
)
def test_an_api_that_anyone_may_use_is_warned_of(
    host: str, keys: ApiKeys | None, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(socket.create_server((host, 0))) as listener, caplog.at_level(logging.WARNING):
        warn_if_open(listener, keys)
    assert ("there is no API key" in caplog.text) is warned
