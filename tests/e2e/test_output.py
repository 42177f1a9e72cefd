"""Nobody has to read what a command says, and a command that cannot say its URL says why."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.deployment import START_SECONDS, STOP_SECONDS, clean_environment, flags, tandem_command
from tests.support.http import Http
from tests.support.processes import session_of, survivors

LINE_BYTES = 150
REQUEST_ID = "x" * 120


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    made: list[subprocess.Popen[str]] = []

    def start(*arguments: str | Path, stdout: int) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            tandem_command("serve", *arguments, "--port", "0"),
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        made.append(process)
        return process

    yield start
    for process in made:
        for pid in session_of(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        process.communicate()


def test_a_stderr_that_nobody_reads_stops_neither_the_service_nor_its_end(
    folder_of: Callable[[str], Path], started: Callable[..., subprocess.Popen[str]]
) -> None:
    arguments = flags(prefill=0, kv_memory="16MiB", connector="tcp")
    process = started(folder_of("qwen3"), *arguments, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    size = fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)
    http = Http(process.stdout.readline().strip())
    # One line for each, which in the end have filled the pipe to us many times over.
    for _ in range(100 * size // LINE_BYTES):
        assert http.complete([1], {"X-Request-Id": REQUEST_ID}, max_tokens=1).status == 200
    assert http.get("/health").status == 200
    pids = session_of(process.pid)
    process.terminate()
    assert process.wait(STOP_SECONDS) == 0
    assert not survivors(pids, STOP_SECONDS)


def test_a_stdout_that_takes_nothing_is_told(
    folder_of: Callable[[str], Path], started: Callable[..., subprocess.Popen[str]]
) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    arguments = flags(prefill=0, kv_memory="16MiB", connector="tcp")
    process = started(folder_of("qwen3"), *arguments, stdout=full)
    os.close(full)
    _, said = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 1, said
    assert "tandem: the URL cannot be written to stdout: No space left on device" in said
    assert "Traceback" not in said
