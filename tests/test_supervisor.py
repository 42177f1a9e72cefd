"""What dies is started anew, and only that; what dies too often ends the command with a reason."""

from __future__ import annotations

import os
import queue
import signal
import time
from collections.abc import Iterator

import pytest

from tandem.errors import EngineStopped, StartError
from tandem.processes import Child, ChildProcesses
from tandem.reports import Following, Report
from tandem.restart_policy import RestartPolicy
from tandem.supervisor import Supervisor, SupervisorThread
from tests.support import child_targets as child_processes
from tests.support.processes import is_alive, until

SECONDS = 30.0


@pytest.fixture(scope="module", autouse=True)
def light_children() -> Iterator[None]:
    """These children need no torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tandem.processes.PRELOAD", ())
        yield


@pytest.fixture
def processes() -> Iterator[ChildProcesses]:
    with ChildProcesses() as made:
        yield made


class Pair:
    """An engine of two ranks that do nothing, or of one that dies at once."""

    def __init__(self, processes: ChildProcesses, name: str) -> None:
        self.name = name
        self.children: list[Child] = []
        self.dies = False
        self.is_mute = False
        self.is_closed = False
        self._processes = processes
        self._up: set[str] = set()

    @property
    def witnesses(self) -> list[Child]:
        return self.children

    @property
    def is_up(self) -> bool:
        return len(self._up) == 2

    def start(self) -> None:
        self._up.clear()
        if self.dies:
            self.children = [self._processes.start(self.name, child_processes.end, 3)]
        elif self.is_mute:
            self.children = [self._processes.start(self.name, child_processes.stay)]
        else:
            names = [f"{self.name} rank {number}" for number in range(2)]
            self.children = [self._processes.start(name, child_processes.stay) for name in names]

    def close(self) -> None:
        self.is_closed = True

    def take(self, child: Child, report: Report) -> None:
        if report == Following():
            self._up.add(child.name)

    @property
    def pids(self) -> list[int]:
        return [child.process.pid for child in self.children if child.process.pid is not None]


def pairs(processes: ChildProcesses) -> tuple[Pair, Pair]:
    """Two that are up."""
    made = Pair(processes, "first"), Pair(processes, "second")
    for pair in made:
        pair.start()
        while not pair.is_up:
            received = processes.next_report(pair.children, SECONDS)
            assert received is not None
            pair.take(*received)
    return made


def run_until(processes: ChildProcesses, supervisor: Supervisor, lines: list[str], text: str) -> None:
    """Let it work until it has said this."""
    deadline = time.monotonic() + SECONDS
    while not any(text in line for line in lines):
        assert time.monotonic() < deadline, lines
        supervisor.step()
        processes.wait(0.02)


def test_the_one_that_died_is_started_anew_whole_and_the_other_goes_on(processes: ChildProcesses) -> None:
    first, second = pairs(processes)
    before, other = first.pids, second.pids
    lines: list[str] = []
    supervisor = Supervisor(processes, [first, second], lines.append, SECONDS)
    os.kill(before[1], signal.SIGKILL)
    run_until(processes, supervisor, lines, "first is back")
    assert not any(is_alive(pid) for pid in before)
    assert not set(before) & set(first.pids)
    assert second.pids == other
    assert all(is_alive(pid) for pid in [*first.pids, *other])
    assert lines[:2] == ["tandem: first rank 1 was killed by SIGKILL", "tandem: first is started anew now"]
    assert len(processes.children) == 4


def test_both_may_die_at_once(processes: ChildProcesses) -> None:
    first, second = pairs(processes)
    lines: list[str] = []
    supervisor = Supervisor(processes, [first, second], lines.append, SECONDS)
    for pid in (first.pids[0], second.pids[1]):
        os.kill(pid, signal.SIGKILL)
    run_until(processes, supervisor, lines, "first is back")
    run_until(processes, supervisor, lines, "second is back")


def test_what_dies_too_often_ends_the_command_and_its_last_lines_are_told(processes: ChildProcesses) -> None:
    first, second = pairs(processes)
    lines: list[str] = []
    supervisor = Supervisor(
        processes, [first, second], lines.append, SECONDS, lambda: RestartPolicy(most=2, first_delay=0.01)
    )
    first.dies = True
    os.kill(first.pids[0], signal.SIGKILL)
    with pytest.raises(StartError) as raised:
        supervisor.run()
    assert "first has died 3 times within " in str(raised.value)
    assert "first exited with 3; its last lines:\none line\nthe last line" in str(raised.value)
    assert sum("is started anew" in line for line in lines) == 2


def test_what_does_not_come_up_in_time_counts_as_dead(processes: ChildProcesses) -> None:
    first, second = pairs(processes)
    lines: list[str] = []
    supervisor = Supervisor(processes, [first, second], lines.append, 0.3, lambda: RestartPolicy(most=1))
    first.is_mute = True
    os.kill(first.pids[0], signal.SIGKILL)
    with pytest.raises(StartError, match=r"first has died 2 times .* first did not start within 0 s"):
        supervisor.run()


def test_what_cannot_be_started_counts_as_dead(processes: ChildProcesses, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = pairs(processes)
    lines: list[str] = []
    supervisor = Supervisor(processes, [first, second], lines.append, SECONDS, lambda: RestartPolicy(most=1))
    os.kill(first.pids[0], signal.SIGKILL)

    def no_room() -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(first, "start", no_room)
    with pytest.raises(StartError, match=r"first cannot be started: .* Resource temporarily unavailable"):
        supervisor.run()


def test_beside_the_caller_it_starts_anew_until_it_is_stopped(processes: ChildProcesses) -> None:
    first, second = pairs(processes)
    before = first.pids
    said: queue.Queue[str] = queue.Queue()
    thread = SupervisorThread(Supervisor(processes, [first, second], said.put, SECONDS), processes)
    os.kill(before[0], signal.SIGKILL)
    while said.get(timeout=SECONDS) != "tandem: first is back":
        pass
    thread.check()
    thread.stop()
    os.kill(second.pids[0], signal.SIGKILL)
    processes.stop()
    assert said.empty(), "nobody takes an end that was asked for for a death"


def test_the_caller_hears_that_it_has_given_up(processes: ChildProcesses) -> None:
    first, second = pairs(processes)
    first.dies = True
    supervisor = Supervisor(processes, [first, second], print, SECONDS, lambda: RestartPolicy(most=1))
    thread = SupervisorThread(supervisor, processes)
    os.kill(first.pids[0], signal.SIGKILL)

    def told() -> bool:
        try:
            thread.check()
        except StartError as error:
            return "first has died 2 times" in str(error)
        return False

    assert until(told, SECONDS)
    thread.stop()


def test_one_that_has_drained_is_not_started_anew_and_the_last_one_ends_the_command(processes: ChildProcesses) -> None:
    first, second = pairs(processes)
    lines: list[str] = []
    router = processes.start("router", child_processes.stay)
    door = Pair(processes, "router")
    door.children = [router]
    units = [door, first, second]
    supervisor = Supervisor(processes, units, lines.append, SECONDS, ends_with=[first, second])
    old, others = first.pids, [*second.pids, *door.pids]
    first.children.append(processes.start("first rank 2", child_processes.drain, "first has drained"))
    run_until(processes, supervisor, lines, "first has drained")
    supervisor.step()
    assert lines == ["tandem: first has drained; it is not started anew"]
    assert first.is_closed, "its clients are refused"
    assert not any(is_alive(pid) for pid in old)
    assert all(is_alive(pid) for pid in others)
    second.children.append(processes.start("second rank 2", child_processes.drain, "second has drained"))
    with pytest.raises(EngineStopped, match="all engines have drained"):
        supervisor.run()
