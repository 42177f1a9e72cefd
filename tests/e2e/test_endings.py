"""However a deployment ends, nothing of it is left."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.deployment import START_SECONDS, Deployment, flags
from tests.support.families import prompt_of
from tests.support.http import Http
from tests.support.processes import survivors, until

BOUND = 15.0
"""Seconds; a quiet machine needs a few."""


@pytest.fixture
def split(folder_of: Callable[[str], Path]) -> Iterator[Deployment]:
    deployment = Deployment(folder_of("qwen3"), *flags(kv_memory="16MiB", connector="tcp"))
    yield deployment
    deployment.kill()


def serving(deployment: Deployment) -> set[int]:
    """Its processes, while it has a request to do."""
    stream = deployment.http.stream(prompt_of(50), max_tokens=900, ignore_eos=True)
    next(iter(stream))
    return deployment.pids


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything_in_good_order(number: signal.Signals, split: Deployment) -> None:
    pids = serving(split)
    assert {rank["pid"] for engine in split.engines().values() for rank in engine["ranks"]} <= pids
    code, seconds = split.end(number)
    assert code == 0, split.log
    assert seconds < BOUND
    assert not survivors(pids, BOUND)
    assert "Traceback" not in split.log
    assert "stopping" in split.log


def test_a_second_ctrl_c_ends_everything_at_once(split: Deployment) -> None:
    pids = serving(split)
    # A stopped process cannot end in good order, so that the first Ctrl-C has something to wait for.
    [rank] = split.engines()["decode-0"]["ranks"]
    os.kill(rank["pid"], signal.SIGSTOP)
    split.process.send_signal(signal.SIGINT)
    assert until(lambda: "stopping" in split.log, BOUND)
    split.process.send_signal(signal.SIGINT)
    split.wait(BOUND)
    assert not survivors(pids, BOUND)
    assert "Traceback" not in split.log


def test_ctrl_c_in_a_terminal_reaches_all_processes_and_still_ends_in_good_order(split: Deployment) -> None:
    pids = serving(split)
    os.killpg(split.process.pid, signal.SIGINT)
    assert split.wait(BOUND) == 0
    assert not survivors(pids, BOUND)
    assert "Traceback" not in split.log


def test_an_engine_on_its_own_ends_with_a_rank_that_dies_and_names_it(folder_of: Callable[[str], Path]) -> None:
    """Whoever has started it starts it anew: `tandem serve` is not there to do it."""
    arguments = flags(kv_memory="16MiB", connector="tcp", engine_id="alone")
    deployment = Deployment(folder_of("qwen3"), *arguments, command="engine", wait=False)
    try:
        assert until(lambda: "alone ready: " in deployment.log, START_SECONDS), deployment.log
        assert "alone: without a cluster key every user of this machine can" in deployment.log
        [url] = re.findall(r"alone ready: .* API (http://\S+)", deployment.log)
        pids = deployment.pids
        [rank] = Http(url).get("/tandem/engine").json["ranks"]
        os.kill(rank["pid"], signal.SIGKILL)
        assert deployment.wait(BOUND) == 1
        assert "tandem: alone rank 0 was killed by SIGKILL; its last lines:" in deployment.log
        assert not survivors(pids, BOUND)
    finally:
        deployment.kill()


def test_children_of_a_command_that_is_killed_end_too_and_its_files_are_removed(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    split = Deployment(folder_of("qwen3"), *flags(kv_memory="16MiB", connector="tcp", decode_tp=2))
    pids = serving(split)
    assert list(tmp_path.iterdir()), "a runtime folder"
    split.process.kill()
    split.process.wait()
    assert not survivors(pids, BOUND)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("processes", [3, 4])
def test_ctrl_c_while_engines_start_ends_everything(processes: int, folder_of: Callable[[str], Path]) -> None:
    """With 3 processes the fork server imports, with the fourth the first child is there."""
    deployment = Deployment(folder_of("qwen3"), *flags(connector="tcp"), wait=False)
    assert until(lambda: len(deployment.pids) >= processes, 60), deployment.log
    pids = deployment.pids
    os.killpg(deployment.process.pid, signal.SIGINT)
    try:
        deployment.wait(BOUND)
        assert not survivors(pids, BOUND)
    finally:
        deployment.kill()
    assert "KeyboardInterrupt" not in deployment.log
