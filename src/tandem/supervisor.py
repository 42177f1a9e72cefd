"""Keeps engines and a router alive: what has died is started anew, while the others go on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tandem.errors import EngineStopped, StartError, TandemError
from tandem.processes import Child, ChildProcesses, settle, why_ended
from tandem.reports import Drained, Report
from tandem.restart_policy import GiveUp, RestartAt, RestartPolicy

log = logging.getLogger(__name__)

REST_SECONDS = 0.5
"""For what is left of an engine of which a process has died: its API may still answer its clients."""


class Unit(Protocol):
    """Processes that live and die together: an engine, or the router."""

    @property
    def name(self) -> str: ...

    @property
    def children(self) -> list[Child]: ...

    @property
    def witnesses(self) -> list[Child]:
        """Children that may say why another one has died; they follow it within moments."""

    @property
    def is_up(self) -> bool: ...

    def start(self) -> None:
        """Start its processes, or the first of them; all earlier ones are gone."""

    def close(self) -> None:
        """It is not going to be started again: refuse the clients that would wait for that."""

    def take(self, child: Child, report: Report) -> None:
        """Take a report of one of its children."""


@dataclass(slots=True)
class _Life:
    """A unit with what is planned for it: a start at `start_at`, or that it be up at `deadline`; `over`: nothing."""

    unit: Unit
    policy: RestartPolicy
    start_at: float | None = None
    deadline: float | None = None
    over: bool = False


class Supervisor:
    """Takes over units that are up.

    Args:
        echo: takes lines for a person.
        start_seconds: within which a unit must be up again.
        ends_with: units without which there is nothing to keep alive.
        new_policy: makes the restart policy of each unit.
    """

    def __init__(
        self,
        processes: ChildProcesses,
        units: Sequence[Unit],
        echo: Callable[[str], None],
        start_seconds: float,
        new_policy: Callable[[], RestartPolicy] = RestartPolicy,
        *,
        ends_with: Sequence[Unit] = (),
    ) -> None:
        self._processes = processes
        self._lives = [_Life(unit, new_policy()) for unit in units]
        self._echo = echo
        self._start_seconds = start_seconds
        self._ends_with = ends_with

    def run(self) -> None:
        """Start anew whatever dies, until all are to end.

        Raises StartError when something dies too often, EngineStopped when all of `ends_with` have drained.
        """
        while not self._processes.ending:
            self._processes.wait(self.step())

    def step(self) -> float | None:
        """Look after every unit once; return the seconds until there is something to do if no child stirs."""
        for life in self._lives:
            self._look_after(life, time.monotonic())
        if any(child.reports for life in self._lives for child in life.unit.children):
            return 0.0  # came while we looked
        planned = [when for life in self._lives for when in (life.start_at, life.deadline) if when is not None]
        return max(0.0, min(planned) - time.monotonic()) if planned else None

    def _look_after(self, life: _Life, now: float) -> None:
        if life.over:
            return
        if life.start_at is not None:
            if now >= life.start_at:
                self._start(life, now)
            return
        children = life.unit.children
        for child in children:
            while child.reports:
                life.unit.take(child, child.reports.popleft())
        if any([child.ends for child in children]):
            settle(life.unit.witnesses)
            drained = [ending for child in children for ending in child.endings if isinstance(ending, Drained)]
            if drained:
                self._drained(life, drained[0].reason)
            else:
                self._died(life, why_ended(children))
        elif life.deadline is not None and life.unit.is_up:
            life.deadline = None
            self._echo(f"tandem: {life.unit.name} is back")
        elif life.deadline is not None and now >= life.deadline:
            self._died(life, f"{life.unit.name} did not start within {self._start_seconds:.0f} s")

    def _start(self, life: _Life, now: float) -> None:
        life.start_at, life.deadline = None, now + self._start_seconds
        try:
            life.unit.start()
        except (TandemError, OSError) as error:
            self._died(life, f"{life.unit.name} cannot be started: {error}")

    def _drained(self, life: _Life, reason: str) -> None:
        self._processes.drop(life.unit.children, REST_SECONDS)
        life.unit.close()
        life.over = True
        self._echo(f"tandem: {reason}; it is not started anew")
        over = [one.unit for one in self._lives if one.over]
        if self._ends_with and all(unit in over for unit in self._ends_with):
            raise EngineStopped("all engines have drained")

    def _died(self, life: _Life, why: str) -> None:
        self._processes.drop(life.unit.children, REST_SECONDS)
        now = time.monotonic()
        match life.policy.died(now):
            case GiveUp(deaths=deaths, seconds=seconds):
                raise StartError(
                    f"{life.unit.name} has died {deaths} times within {seconds:.0f} s, the last time: {why}"
                )
            case RestartAt(time=at):
                when = f"in {at - now:.0f} s" if at > now else "now"
                self._echo(f"tandem: {why}")
                self._echo(f"tandem: {life.unit.name} is started anew {when}")
                life.start_at, life.deadline = at, None


class SupervisorThread:
    """Supervises beside whatever else the process does."""

    def __init__(self, supervisor: Supervisor, processes: ChildProcesses) -> None:
        self._supervisor = supervisor
        self._processes = processes
        self._error: StartError | None = None
        self._thread = threading.Thread(target=self._run, name="tandem supervisor", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise StartError if something has died too often, and nobody starts anything any more."""
        if self._error is not None:
            raise StartError(str(self._error))

    def stop(self) -> None:
        """Start nothing any more; the processes are the caller's to stop."""
        self._processes.end()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._supervisor.run()
        except StartError as error:
            self._error = error
        except Exception as error:
            log.exception("the supervisor died")
            self._error = StartError(f"what dies is not started anew any more: {error}")
