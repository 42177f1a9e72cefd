"""One round: load, a fault at its moment, and everything until the cluster is whole and the load has ended."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.chaos.checks import idle_problems, path_problems
from tests.chaos.cluster import Cluster
from tests.chaos.faults import Fault, apply
from tests.chaos.load import GOOD, Answer, Book, Events, Question, Record, Request, ask
from tests.chaos.processes import Process, resident_and_files

WHOLE_SECONDS = 90.0
"""Within which all paths must be there again; then the harness itself starts what does not come."""
GRACE_SECONDS = 10.0
"""Beyond --request-timeout, before a request without end is called hung."""
EFFECT_SECONDS = 10.0
NOTICED_SECONDS = 1.0
"""By then a cut or a long stop is noticed, by those who end for it too."""
LONG_STOP_SECONDS = 2.0
IGNORED_SECONDS = 2.0
"""A process that is still there so long after its signal does not end for it."""
PROBE_SECONDS = 0.5
THINK_SECONDS = 0.3
"""At most, between a client's requests; engines that start need some of the cores too."""
REFUSED_SECONDS = 0.2
AFTER_SECONDS = 0.3
"""The load goes on for so long after the cluster is whole."""


@dataclass
class Round:
    """What happened in a round. Times in seconds from its fault; `fault_at` from its start.

    Attributes:
        first_good: until the first right answer of more than one token to a request that was sent after the fault.
        whole: until all paths were there.
        problems: held, stale or wrong after the load was paused; a cluster that did not become whole; processes
            left behind.
        resources: of each command when the load was paused: starts, bytes of memory and open files of its processes.
    """

    number: int
    connector: str
    fault: Fault
    victim: str = ""
    hit: bool = False
    fault_at: float = 0.0
    first_good: float | None = None
    whole: float | None = None
    seconds: float = 0.0
    checked: bool = False
    problems: list[str] = field(default_factory=list)
    endings: list[str] = field(default_factory=list)
    resources: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)

    @property
    def slowest(self) -> float | None:
        """Seconds of the right answer that took longest."""
        return max((record.ended - record.sent for record in self.records if record.verdict == "right"), default=None)

    def failures(self) -> list[Record]:
        return [record for record in self.records if record.verdict not in (*GOOD, "error", "lost")]

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"moment": str(self.fault.moment)}


class RoundRunner:
    """Runs one round on a cluster that is whole."""

    def __init__(self, cluster: Cluster, book: Book, seed: int, clients: int, round_: Round) -> None:
        self._cluster = cluster
        self._book = book
        self._round = round_
        self._rng_name = f"{seed}/{round_.number}"
        self._clients = clients
        self._events = Events()
        self._stop = asyncio.Event()
        self._started = 0.0
        self._faulted: float | None = None
        self._endings_before = len(cluster.endings)
        self._short = [q for q in book.questions if q.choices == 1 and int(q.body["max_tokens"]) <= 8]

    async def run(self, check: bool) -> None:
        """Fill in the round. `check`: also what must be true once the load has ended."""
        round_ = self._round
        self._started = time.monotonic()
        async with asyncio.TaskGroup() as load:
            for client in range(self._clients):
                load.create_task(self._client(client))
            try:
                await self._disturb(load)
            finally:
                self._stop.set()
        round_.seconds = time.monotonic() - self._started
        if self._faulted is not None:
            fault_at = self._faulted - self._started
            good = [r for r in round_.records if r.sent >= fault_at and r.verdict == "right" and r.tokens > 1]
            round_.first_good = min((record.ended - fault_at for record in good), default=None)
        if check:
            await self._check()
        for ending in self._cluster.endings[self._endings_before :]:
            round_.endings.append(f"{ending.name} ended with {ending.code}, {ending.at - self._started:.1f} s")
            round_.problems += [f"{ending.name} left a process behind: {process}" for process in ending.left]

    async def _disturb(self, load: asyncio.TaskGroup) -> None:
        round_, fault = self._round, self._round.fault
        await fault.moment.wait(self._events)
        applied = await apply(self._cluster, fault)
        self._faulted = time.monotonic()
        round_.victim, round_.hit, round_.fault_at = applied.victim, applied.hit, self._faulted - self._started
        probes = load.create_task(self._probes(load))
        try:
            await applied.end(fault)
            if fault.kind in ("kill", "terminate"):
                await self._wait_for_effect(applied.processes)
            if fault.kind == "cut" or (fault.kind == "stop" and fault.seconds > LONG_STOP_SECONDS):
                await asyncio.sleep(NOTICED_SECONDS)
            await self._wait_whole()
            await asyncio.sleep(AFTER_SECONDS)
        finally:
            probes.cancel()

    async def _wait_for_effect(self, victims: tuple[Process, ...]) -> None:
        """Wait until the victims are gone and their commands have ended; some ignore a signal, or are not missed."""
        asked = time.monotonic()
        while victims and (waited := time.monotonic() - asked) < EFFECT_SECONDS:
            survives = any(Process.find(victim.pid) == victim for victim in victims)
            ended = len(self._cluster.endings) >= self._endings_before + len(victims)
            if (ended and not survives) or (survives and waited > IGNORED_SECONDS):
                return
            await asyncio.sleep(0.05)

    async def _wait_whole(self) -> None:
        missing = await self._cluster.wait_whole(WHOLE_SECONDS)
        self._round.whole = time.monotonic() - (self._faulted or 0.0)
        if missing is None:
            return
        self._round.problems.append(f"not whole after {WHOLE_SECONDS:.0f} s: {missing}")
        for name, command in self._cluster.commands.items():
            if name in missing:
                command.kill()
        if (missing := await self._cluster.wait_whole(WHOLE_SECONDS)) is not None:
            raise RuntimeError(f"the cluster does not become whole again: {missing}")

    async def _client(self, number: int) -> None:
        """One request after the other until the round's load is stopped."""
        rng = random.Random(f"{self._rng_name}/client {number}")
        while not self._stop.is_set():
            question = rng.choice(self._book.questions)
            stream = rng.random() < 0.6
            leaves = rng.randint(1, 12) if stream and rng.random() < 0.15 else None
            record = await self._ask(Request(question, stream, leaves), probe=False)
            pause = REFUSED_SECONDS if record.verdict == "lost" or record.code == "unavailable" else 0.0
            await asyncio.sleep(pause + rng.uniform(0.0, THINK_SECONDS))

    async def _probes(self, load: asyncio.TaskGroup) -> None:
        """Short requests at a steady rate, each on its own, so that one that waits does not hide that others go."""
        rng = random.Random(f"{self._rng_name}/probes")
        while True:
            load.create_task(self._ask(Request(rng.choice(self._short)), probe=True))
            await asyncio.sleep(PROBE_SECONDS)

    async def _ask(self, request: Request, probe: bool) -> Record:
        question, cluster = request.question, self._cluster
        sent = time.monotonic()
        record = Record(
            self._round.number, question.number, request.stream, request.leaves, probe, sent - self._started
        )
        starts = cluster.router_starts
        seconds = cluster.settings.request_timeout + GRACE_SECONDS
        answer = await ask(cluster.http, cluster.url, request, seconds, None if probe else self._events)
        record.ended = time.monotonic() - self._started
        self._judge(record, question, answer)
        if answer is not None and answer.lost and record.verdict == "untyped" and await self._router_died(starts):
            record.verdict, record.detail = "lost", answer.lost
        elif record.verdict not in GOOD:
            record.usable = cluster.usable(await cluster.engines())
        if record.verdict == "wrong":
            record.detail += await self._again(question)
        self._round.records.append(record)
        return record

    def _judge(self, record: Record, question: Question, answer: Answer | None) -> None:
        record.verdict, record.code, record.detail = self._book.verdict(question, answer)
        if answer is not None:
            record.tokens = sum(len(choice.tokens) for choice in answer.choices)
            record.first, record.pause, record.how = answer.first, answer.pause, answer.how

    async def _router_died(self, starts: int) -> bool:
        """Whether the router was hit in this round, or started again since it had been `starts` times."""
        deadline = time.monotonic() + 3.0
        while time.monotonic() < deadline:
            hit = self._round.hit and self._round.fault.target == "router" and self._round.fault.kind != "stop"
            if hit or self._cluster.router_starts != starts or self._cluster.commands["router"].pid is None:
                return True
            await asyncio.sleep(0.05)
        return False

    async def _again(self, question: Question) -> str:
        """Tell a wrong answer that comes again from one that does not."""
        verdicts = []
        for _ in range(3):
            answer = await ask(self._cluster.http, self._cluster.url, Request(question), GRACE_SECONDS)
            verdicts.append(self._book.verdict(question, answer)[0])
        return f"; asked again: {', '.join(verdicts)}"

    async def _check(self) -> None:
        round_ = self._round
        round_.checked = True
        round_.problems += await idle_problems(self._cluster)
        round_.problems += await path_problems(self._cluster, self._book)
        round_.problems += await idle_problems(self._cluster)
        for name, command in self._cluster.commands.items():
            used = [resident_and_files(pid) for pid in command.pids()]
            round_.resources[name] = (command.starts, sum(each[0] for each in used), sum(each[1] for each in used))
