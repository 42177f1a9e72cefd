"""A client that leaves at any moment frees both engines within a step or two, in virtual time."""

from __future__ import annotations

from functools import cache

import pytest

from tests.simulator.cancellation import Cancelled, Setting, cancel

LIMIT_SECONDS = 0.1
MOMENT_SECONDS = 0.006
SETTINGS = {
    "idle engines": (Setting(0.01), 30),
    "pipelines of two stages": (Setting(0.01, pp=2), 50),
    "another request before it": (Setting(0.01, rival=True), 55),
    "reads that outlast a lease": (Setting(0.01, slow=0.5), 50),
}


@cache
def sweep(name: str) -> list[Cancelled]:
    setting, moments = SETTINGS[name]
    runs = [cancel(setting, (1 + moment) * MOMENT_SECONDS, seed) for moment in range(moments) for seed in (1, 2)]
    return [one for one in runs if one is not None]


@pytest.mark.parametrize("name", SETTINGS)
def test_whoever_leaves_lets_go_of_both_engines(name: str) -> None:
    found = sweep(name)
    assert max(one.seconds for one in found) <= LIMIT_SECONDS, [one for one in found if one.seconds > LIMIT_SECONDS]
    if not SETTINGS[name][0].slow:
        assert max(one.writable for one in found) <= LIMIT_SECONDS, "reads end by themselves"


def test_every_state_of_a_request_is_met() -> None:
    states = {state for name in SETTINGS for one in sweep(name) for state in one.state.split(", ")}
    assert states >= {
        "prefill waiting",
        "prefill running",
        "prefill leased",
        "decode waiting",
        "decode waiting_for_kv",
        "decode waiting_for_slot",
        "decode running",
    }
