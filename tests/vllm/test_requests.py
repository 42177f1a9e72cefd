from __future__ import annotations

from typing import Any

import pytest

from tandem.config_access import AccessSection
from tandem.errors import ConfigError
from tandem.vllm.options import parse_options
from tandem.vllm.requests import ExportKv, Refused, read_params
from tandem.wire.messages import Address, PullKv

ACCESS = AccessSection()
NIXL_PREFILL = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
PUBLISHED: dict[str, Any] = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_engine_id": "p",
    "remote_incarnation": "1",
    "remote_request_id": "cmpl-1",
    "remote_host": "127.0.0.1",
    "remote_port": 7000,
    "remote_block_ids": None,
    "something_new": 1,
}


def test_what_the_toy_proxy_sends_is_understood() -> None:
    assert read_params(NIXL_PREFILL, "cmpl-1", ACCESS) == ExportKv("cmpl-1", published=True)
    assert read_params(PUBLISHED, "cmpl-2", ACCESS) == PullKv(
        "p", "1", Address("127.0.0.1", 7000), "cmpl-1", first_token=False, foreign=True
    )
    assert read_params({}, "cmpl-3", ACCESS) is None


def test_a_transfer_id_names_the_hand_off_on_both_sides() -> None:
    assert read_params({**NIXL_PREFILL, "transfer_id": "t"}, "a", ACCESS) == ExportKv("t", published=False)
    pull = read_params({**PUBLISHED, "remote_request_id": None, "transfer_id": "t"}, "b", ACCESS)
    assert isinstance(pull, PullKv)
    assert pull.remote_request_id == "t"


@pytest.mark.parametrize(
    "wrong",
    [
        {"remote_port": 0},
        {"remote_port": 65536},
        {"remote_port": "7000"},
        {"remote_host": None},
        {"remote_host": "10.0.0.1"},
        {"remote_host": "example.org"},
        {"remote_engine_id": None},
        {"remote_request_id": None},
        {"do_remote_prefill": "yes"},
    ],
)
def test_params_that_lead_nowhere_are_refused(wrong: dict[str, Any]) -> None:
    assert isinstance(read_params({**PUBLISHED, **wrong}, "r", ACCESS), Refused)


def test_unknown_options_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"arena_gb.*arena_gib"):
        parse_options({"arena_gb": 1})


@pytest.mark.parametrize(
    "wrong", [{"arena_gib": 0}, {"port": 65536}, {"port": -1}, {"lease_ttl": 0.5}, {"connector": "rdma"}]
)
def test_options_out_of_bounds_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        parse_options(wrong)


def test_options_at_their_bounds_are_taken() -> None:
    assert parse_options({"port": 65535, "lease_ttl": 1.0, "connector": "tcp", "arena_gib": 0.5}).arena_bytes == 1 << 29
