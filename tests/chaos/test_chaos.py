"""Twenty rounds of faults, and that the harness itself judges rightly and leaves nothing behind."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.faults import Moment, deck, fault_of, pipeline_of
from tests.chaos.load import Answer, Book, Choice, Question, difference, questions
from tests.chaos.support import clean_environment, is_alive

SEED = 1
ROOT = Path(__file__).parent.parent.parent
ROUNDS = ("--rounds", "20", "--connector", "both", "--quick", "--longest-pause", "3", "--questions", "60")


@pytest.mark.timeout(900)
def test_every_answer_is_right_or_a_typed_error_whatever_dies(tmp_path: Path) -> None:
    command = harness(
        *ROUNDS, "--seed", str(SEED), "--transformers", "2", "--folder", tmp_path, "--json", tmp_path / "all"
    )
    ended = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=850)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rounds = json.loads((tmp_path / "all").read_text())["rounds"]
    assert [round_["number"] for round_ in rounds] == list(range(20))
    assert sum(round_["hit"] for round_ in rounds) >= 18
    assert {round_["connector"] for round_ in rounds} == {"nixl", "tcp"}
    assert not processes_of(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_when_the_harness_is_interrupted(number: signal.Signals, tmp_path: Path) -> None:
    command = harness("--connector", "tcp", "--folder", tmp_path)
    with subprocess.Popen(command, cwd=ROOT, env=clean_environment(), stdout=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 60
            while len(processes_of(tmp_path)) < 12 and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(number)
            assert process.wait(60) == 1
        finally:
            process.kill()
    assert not processes_of(tmp_path)


def harness(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "tests.chaos", *map(str, arguments)]


def processes_of(folder: Path) -> set[int]:
    """The living processes whose temporary files are below the folder: all that a cluster has started there."""
    return {pid for pid, environment in environments() if f"TMPDIR={folder}/" in environment and is_alive(pid)}


def environments() -> Iterator[tuple[int, str]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                yield int(entry.name), (entry / "environ").read_bytes().decode(errors="replace")
            except (FileNotFoundError, PermissionError, ProcessLookupError):
                continue


@pytest.mark.parametrize("quick", [True, False])
def test_a_round_follows_from_seed_and_number_alone(quick: bool) -> None:
    pairs = deck(5, quick, cuts=True)
    faults = [fault_of(5, number, pairs, 20.0) for number in range(60)]
    assert faults == [fault_of(5, number, deck(5, quick, cuts=True), 20.0) for number in range(60)]
    assert faults != [fault_of(6, number, deck(6, quick, cuts=True), 20.0) for number in range(60)]
    assert all(0.1 <= fault.seconds <= 20.0 for fault in faults)
    assert questions(5, 20) == questions(5, 20) != questions(6, 20)


def test_every_kind_of_fault_is_in_a_long_run() -> None:
    pairs = set(deck(1, quick=False, cuts=True))
    assert {("kill", "decode rank"), ("terminate", "router"), ("stop", "fork server"), ("cut", "within engine")} < pairs
    assert {kind for kind, _ in deck(1, quick=False, cuts=False)} == {"kill", "terminate", "stop"}


def test_some_runs_have_a_pipeline_and_which_follows_from_the_seed() -> None:
    runs = [(seed, connector) for seed in range(20) for connector in ("nixl", "tcp")]
    chosen = [pipeline_of(*run) for run in runs]
    assert chosen == [pipeline_of(*run) for run in runs]
    assert set(chosen) == {None, "prefill-1", "decode-1"}
    assert {pipeline_of(SEED, "nixl"), pipeline_of(SEED, "tcp")} - {None}, "the rounds of this test have one"


def test_moments_come_before_and_amid_answers() -> None:
    rng = random.Random(1)
    assert {Moment.draw(rng).event for _ in range(100)} == {"start", "sent", "first token", "token"}


QUESTION = Question(0, "/v1/completions", {"prompt": [1], "max_tokens": 3, "temperature": 0})


def answer(*tokens: int, **other: object) -> Answer:
    made = Answer([Choice(list(tokens), text=str(tokens), finish="length")], status=200)
    for name, value in other.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("came", "verdict"),
    [
        (answer(1, 2, 3), "right"),
        (answer(1, 3), "wrong"),
        (answer(1, 2, 2, 3), "wrong"),
        (answer(1, 2), "wrong"),
        (answer(1, 2, 4), "wrong"),
        (answer(1, 2, left=True), "left"),
        (answer(1, 3, left=True), "wrong"),
        (answer(1, error={"code": "engine_failed", "message": "m", "type": "server_error"}), "error"),
        (answer(2, error={"code": "engine_failed", "message": "m", "type": "server_error"}), "wrong"),
        (answer(broken="no JSON"), "untyped"),
        (answer(2, broken="no [DONE]"), "wrong"),
        (answer(1, 2, 3, broken="no [DONE]"), "untyped"),
        (answer(1, lost="ServerDisconnectedError()"), "untyped"),
        (None, "hung"),
    ],
)
def test_the_verdict_on_an_answer(came: Answer | None, verdict: str) -> None:
    book = Book([QUESTION])
    book.answers[0] = answer(1, 2, 3)
    assert book.verdict(QUESTION, came)[0] == verdict


def test_other_logprobs_are_wrong_and_rounding_is_not() -> None:
    right, same, other = (answer(1, 2, 3) for _ in range(3))
    for made, change in ((right, 0.0), (same, 1e-5), (other, 0.1)):
        made.choices[0].logprobs = [-1.0, -2.0, -3.0 + change]
    assert not difference(same, right)
    assert "logprobs" in difference(other, right)
