"""Children with an owner: they report to it, it hears how they end, and none outlives it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem.errors import EngineStopped, StartError
from tandem.processes import Child, ChildProcesses
from tandem.reports import Ended, Following, Loading
from tests.support import child_targets as child_processes
from tests.support.processes import is_alive, survivors

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
def children(lines: list[str]) -> Iterator[ChildProcesses]:
    with ChildProcesses(echo=lines.append) as made:
        yield made


def pid_of(children: ChildProcesses, child: Child) -> int:
    """Its pid, once it runs."""
    while (received := children.next_report([child], PATIENCE)) is not None:
        if received[1] == Following():
            assert child.process.pid is not None
            return child.process.pid
    raise AssertionError(f"{child.name} did not start")


def test_reports_come_in_order_and_one_at_a_time(children: ChildProcesses) -> None:
    child = children.start("reporter", child_processes.load, 3)
    received = [children.next_report([child], PATIENCE) for _ in range(4)]
    assert received == [(child, report) for report in (Loading(0, 3), Loading(1, 3), Loading(2, 3), Following())]


def test_reports_of_a_child_that_nobody_waits_for_are_kept(children: ChildProcesses) -> None:
    first, second = (children.start(name, child_processes.stay) for name in ("first", "second"))
    assert children.next_report([second], PATIENCE) == (second, Following())
    assert children.next_report([first], PATIENCE) == (first, Following())


def test_waiting_ends_when_the_time_is_over(children: ChildProcesses) -> None:
    child = children.start("quiet", child_processes.stay)
    pid_of(children, child)
    assert children.next_report([child], 0.01) is None


def test_a_child_that_ends_is_told_with_its_exit_code_and_last_lines(
    children: ChildProcesses, lines: list[str]
) -> None:
    children.start("unlucky", child_processes.end, 3)
    with pytest.raises(StartError) as raised:
        children.next_report([], PATIENCE)
    assert str(raised.value) == "unlucky exited with 3; its last lines:\none line\nthe last line"
    assert lines == ["one line", "the last line"]


def test_a_child_that_is_killed_is_told_with_the_signal(children: ChildProcesses) -> None:
    child = children.start("victim", child_processes.stay)
    os.kill(pid_of(children, child), signal.SIGKILL)
    with pytest.raises(StartError, match="victim was killed by SIGKILL"):
        children.next_report([], PATIENCE)


def test_an_error_that_a_child_knows_is_its_sentence_alone(children: ChildProcesses, lines: list[str]) -> None:
    children.start("knowing", child_processes.fail, "the model has no weights")
    with pytest.raises(StartError) as raised:
        children.next_report(children.children, PATIENCE)
    assert str(raised.value) == "the model has no weights"
    assert lines == []


def test_the_same_error_of_many_is_said_once(children: ChildProcesses) -> None:
    for number in range(3):
        children.start(f"rank {number}", child_processes.fail, "the ranks disagree")
    with pytest.raises(StartError) as raised:
        children.next_report([], PATIENCE)
    assert str(raised.value) == "the ranks disagree"


def test_a_bug_in_a_child_is_told_with_its_traceback(children: ChildProcesses) -> None:
    children.start("buggy", child_processes.stumble)
    with pytest.raises(StartError, match=r"buggy exited with 1; its last lines:\n(.*\n)+ValueError: a bug"):
        children.next_report([], PATIENCE)


def test_who_only_lost_another_rank_does_not_speak_for_the_one_that_knows_why(children: ChildProcesses) -> None:
    children.start("rank 0", child_processes.lose_rank, "rank 1 of this engine was lost")
    children.start("rank 1", child_processes.fail, "the disk is full")
    with pytest.raises(StartError) as raised:
        children.next_report([], PATIENCE)
    assert str(raised.value) == "the disk is full"


def test_the_loss_of_a_rank_is_told_where_nobody_knows_why(children: ChildProcesses) -> None:
    children.start("rank 0", child_processes.lose_rank, "rank 1 of this engine was lost")
    with pytest.raises(StartError, match="rank 1 of this engine was lost"):
        children.next_report([], PATIENCE)


def test_an_end_in_good_order_that_the_owner_did_not_ask_for_is_no_error(children: ChildProcesses) -> None:
    children.start("rank 2", child_processes.end_well, "the engine was ended on node 0")
    with pytest.raises(EngineStopped) as raised:
        children.next_report([], PATIENCE)
    assert str(raised.value) == "the engine was ended on node 0"


def test_children_do_not_import_the_main_module_again(children: ChildProcesses) -> None:
    child = children.start("child", child_processes.name_main)
    with pytest.raises(EngineStopped):
        children.next_report([child], PATIENCE)
    [ended] = child.endings
    assert isinstance(ended, Ended)
    seen = json.loads(ended.reason)
    assert seen["main"] != sys.modules["__main__"].__file__
    assert seen["modules"] == []
    assert sys.modules["__main__"].__file__


def test_none_is_left_when_the_owner_goes_on_whatever_happens() -> None:
    pids: list[int] = []

    def use() -> None:
        with ChildProcesses() as children:
            pids.extend(
                pid_of(children, children.start(f"child {number}", child_processes.stay)) for number in range(2)
            )
            raise RuntimeError("whatever happens")

    with pytest.raises(RuntimeError, match="whatever happens"):
        use()
    assert len(pids) == 2
    assert not any(is_alive(pid) for pid in pids)


def test_a_child_that_is_being_started_when_the_interrupt_comes_is_ended_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(**_: object) -> None:
        raise KeyboardInterrupt

    with ChildProcesses() as children:
        with monkeypatch.context() as patch:
            patch.setattr("tandem.processes.threading.Thread", interrupt)
            with pytest.raises(KeyboardInterrupt):
                children.start("child", child_processes.stay)
        [child] = multiprocessing.active_children()
        assert child.is_alive()
    assert not multiprocessing.active_children()


def test_who_does_not_end_when_asked_is_made_to(children: ChildProcesses) -> None:
    child = children.start("stubborn", child_processes.stay_whatever_comes)
    pid = pid_of(children, child)
    children.stop(seconds=0.2)
    assert not is_alive(pid)
    children.stop()


def test_stopping_is_no_mishap(children: ChildProcesses) -> None:
    child = children.start("child", child_processes.stay)
    pid_of(children, child)
    children.stop()
    children.check()


OWNER = """
import sys
from tandem import processes
processes.PRELOAD = ()
from tests.support import child_targets as child_processes
children = processes.ChildProcesses()
child = children.start("child", child_processes.stay)
assert children.next_report([child], 60)
print(child.process.pid, flush=True)
children.next_report([], None)
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
