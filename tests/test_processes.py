"""Children with an owner: they tell it things, it hears how they end, and none outlives it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem.errors import StartError
from tandem.processes import Child, ChildProcesses
from tests import child_processes
from tests.e2e.processes import is_alive, survivors

PATIENCE = 60.0


@pytest.fixture(scope="module", autouse=True)
def light_children() -> Iterator[None]:
    """These children need no torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tandem.processes.PRELOAD", ())
        yield


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def family(lines: list[str]) -> Iterator[ChildProcesses]:
    with ChildProcesses(echo=lines.append) as made:
        yield made


def pid_of(family: ChildProcesses, child: Child) -> int:
    while not any(word == "pid" for word, _ in child.reports):
        assert family.wait([child], PATIENCE)
        if not any(word == "pid" for word, _ in child.reports):
            child.reports.clear()
    return next(value for word, value in child.reports if word == "pid")


def test_what_a_child_tells_comes_in_order(family: ChildProcesses) -> None:
    child = family.start("teller", child_processes.tell, 1, "two", [3])
    pid_of_last = []
    while not pid_of_last:
        assert family.wait([child], PATIENCE)
        pid_of_last = [value for word, value in child.reports if word == "pid"]
    assert [value for word, value in child.reports if word == "value"] == [1, "two", [3]]


def test_waiting_ends_when_the_time_is_over(family: ChildProcesses) -> None:
    child = family.start("quiet", child_processes.stay)
    pid_of(family, child)
    child.reports.clear()
    assert not family.wait([child], 0.01)


def test_a_child_that_ends_is_told_with_its_exit_code_and_last_lines(family: ChildProcesses, lines: list[str]) -> None:
    family.start("unlucky", child_processes.end, 3)
    with pytest.raises(StartError) as raised:
        family.wait([], PATIENCE)
    assert str(raised.value) == "unlucky exited with 3; its last lines:\none line\nthe last line"
    assert lines == ["one line", "the last line"]


def test_a_child_that_is_killed_is_told_with_the_signal(family: ChildProcesses) -> None:
    child = family.start("victim", child_processes.stay)
    os.kill(pid_of(family, child), signal.SIGKILL)
    with pytest.raises(StartError, match="victim was killed by SIGKILL"):
        family.wait([], PATIENCE)


def test_an_error_that_a_child_knows_is_its_sentence_alone(family: ChildProcesses, lines: list[str]) -> None:
    family.start("knowing", child_processes.fail, "the model has no weights")
    with pytest.raises(StartError) as raised:
        family.wait(family.children, PATIENCE)
    assert str(raised.value) == "the model has no weights"
    assert lines == []


def test_the_same_error_of_many_is_said_once(family: ChildProcesses) -> None:
    for number in range(3):
        family.start(f"rank {number}", child_processes.fail, "the ranks disagree")
    with pytest.raises(StartError) as raised:
        family.wait([], PATIENCE)
    assert str(raised.value) == "the ranks disagree"


def test_a_bug_in_a_child_is_told_with_its_traceback(family: ChildProcesses) -> None:
    family.start("buggy", child_processes.stumble)
    with pytest.raises(StartError, match=r"buggy exited with 1; its last lines:\n(.*\n)+ValueError: a bug"):
        family.wait([], PATIENCE)


def test_children_do_not_import_the_main_module_again(family: ChildProcesses) -> None:
    child = family.start("child", child_processes.name_main)
    pid_of_child = None
    seen = {}
    while pid_of_child is None:
        assert family.wait([child], PATIENCE)
        while child.reports:
            word, value = child.reports.popleft()
            seen[word] = value
        pid_of_child = seen.get("pid")
    assert seen["main"] != sys.modules["__main__"].__file__
    assert seen["modules"] == []
    assert "__main__" in sys.modules
    assert sys.modules["__main__"].__file__


def test_none_is_left_when_the_family_ends_whatever_happens() -> None:
    pids: list[int] = []

    def use() -> None:
        with ChildProcesses() as family:
            pids.extend(pid_of(family, family.start(f"child {number}", child_processes.stay)) for number in range(2))
            raise RuntimeError("whatever happens")

    with pytest.raises(RuntimeError, match="whatever happens"):
        use()
    assert len(pids) == 2
    assert not any(is_alive(pid) for pid in pids)


def test_a_child_that_is_being_started_when_the_interrupt_comes_is_ended_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(**_: object) -> None:
        raise KeyboardInterrupt

    with ChildProcesses() as family:
        with monkeypatch.context() as patch:
            patch.setattr("tandem.processes.threading.Thread", interrupt)
            with pytest.raises(KeyboardInterrupt):
                family.start("child", child_processes.stay)
        [child] = multiprocessing.active_children()
        assert child.is_alive()
    assert not multiprocessing.active_children()


def test_who_does_not_end_when_asked_is_made_to(family: ChildProcesses) -> None:
    child = family.start("stubborn", child_processes.stay_whatever_comes)
    pid = pid_of(family, child)
    family.stop(seconds=0.2)
    assert not is_alive(pid)
    family.stop()


def test_stopping_is_no_mishap(family: ChildProcesses) -> None:
    child = family.start("child", child_processes.stay)
    pid_of(family, child)
    family.stop()
    family.check()


OWNER = """
import sys
from tandem import processes
processes.PRELOAD = ()
from tests import child_processes
family = processes.ChildProcesses()
child = family.start("child", child_processes.stay)
assert family.wait([child], 60)
print(child.reports[0][1], flush=True)
family.wait([], None)
"""


def test_a_child_ends_when_its_owner_is_killed() -> None:
    root = str(Path(__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, root])}
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, env=environment, text=True) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert is_alive(pid)
        owner.kill()
    assert not survivors([pid], PATIENCE)
