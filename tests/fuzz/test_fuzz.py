"""A sample of the fuzzer, the same each time; `python -m tests.fuzz` runs as much as one likes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.live.attack import attack
from tests.fuzz.runner import fuzz
from tests.fuzz.targets import TARGETS

SEED = 20
INPUTS = {"codecs": 5000, "prefill": 5000, "decode": 1000, "engine": 1200, "router": 1200, "tcp": 3000, "http": 1000}
LIVE_INPUTS = 3000


@pytest.mark.parametrize("name", TARGETS)
def test_what_comes_from_outside_breaks_no_promise(name: str) -> None:
    report = fuzz(TARGETS[name], INPUTS[name], SEED)
    assert report.inputs >= INPUTS[name]
    assert report.log_bytes < 400 * report.inputs


@pytest.mark.parametrize("keyed", [True, False], ids=["with a cluster key", "without"])
def test_a_cluster_serves_on_whatever_comes_to_its_ports(keyed: bool, tmp_path: Path) -> None:
    report = attack(tmp_path, LIVE_INPUTS, SEED, keyed=keyed)
    assert sum(report.inputs.values()) >= LIVE_INPUTS
    assert report.served > 0
