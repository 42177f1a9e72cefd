"""What is done to a cluster, and when: all of it follows from a seed and the number of the round."""

from __future__ import annotations

import asyncio
import random
import signal
from dataclasses import dataclass

from tests.chaos.cluster import ENGINES, Cluster
from tests.chaos.load import Events
from tests.chaos.processes import Connection, Process, connections, cut

MOMENT_SECONDS = 10.0
"""A moment that is waited for longer than this has come."""

SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "stop": signal.SIGSTOP}
PROCESSES = {
    "prefill leader": 6,
    "prefill rank": 4,
    "decode leader": 6,
    "decode rank": 4,
    "both prefill leaders": 2,
    "both decode leaders": 2,
    "engine api": 3,
    "fork server": 3,
    "command": 2,
    "router": 2,
}
"""How often each is hit in a long run, relative to the others."""
LINKS = {"router to prefill": 2, "router to decode": 2, "prefill to decode": 4, "within engine": 3, "api to engine": 1}
KINDS = {"kill": 1.0, "stop": 1.0, "terminate": 0.4}


@dataclass(frozen=True)
class Moment:
    """After the `count`-th `event` (sent, first token, token) of the round, and `delay` seconds more."""

    event: str
    count: int
    delay: float

    @classmethod
    def draw(cls, rng: random.Random) -> Moment:
        event = rng.choice(["start", "sent", "first token", "token"])
        if event == "start":
            return cls(event, 0, round(rng.uniform(0.0, 1.0), 3))
        count = rng.randint(1, 40) if event == "token" else rng.randint(1, 8)
        return cls(event, count, rng.choice([0.0, 0.0, round(rng.uniform(0.0, 0.05), 4)]))

    def __str__(self) -> str:
        after = "the start" if self.event == "start" else f"{self.event} {self.count}"
        return f"{self.delay:.3f} s after {after}"

    async def wait(self, events: Events) -> None:
        if self.event != "start":
            try:
                await asyncio.wait_for(events.reached(self.event, self.count), MOMENT_SECONDS)
            except TimeoutError:
                pass
        await asyncio.sleep(self.delay)


@dataclass(frozen=True)
class Fault:
    """One fault. `seconds`: how long a stopped process stays so. `pick`: chooses among several victims."""

    kind: str
    target: str
    moment: Moment
    seconds: float
    pick: float

    @property
    def name(self) -> str:
        return f"{self.kind} {self.target}"


def deck(seed: int, quick: bool, cuts: bool) -> list[tuple[str, str]]:
    """Return kinds and targets in the order in which rounds take them, again and again. Every pair is in it."""
    weighted = {(kind, target): weight * KINDS[kind] for kind in KINDS for target, weight in PROCESSES.items()}
    if cuts:
        weighted |= {("cut", link): float(weight) for link, weight in LINKS.items()}
    rng = random.Random(f"{seed}/deck")
    if not quick:
        pairs = [pair for pair, weight in weighted.items() for _ in range(max(1, round(weight / 2)))]
        rng.shuffle(pairs)
        return pairs

    # Little time: most faults are those from which a cluster recovers without starting a process.
    def drawn(kinds: tuple[str, ...], number: int) -> list[tuple[str, str]]:
        left = {pair: weight for pair, weight in weighted.items() if pair[0] in kinds}
        chosen = []
        for _ in range(min(number, len(left))):
            [pair] = rng.choices(list(left), list(left.values()))
            chosen.append(pair)
            del left[pair]
        return chosen

    pairs = drawn(("kill", "terminate"), 3) + drawn(("cut",), len(LINKS)) + drawn(("stop",), len(PROCESSES))
    if not cuts:
        pairs += drawn(("stop",), len(LINKS))
    rng.shuffle(pairs)
    return pairs


def pipeline_of(seed: int, connector: str) -> str | None:
    """Return which engine has pipeline stages in a run; None: all ranks are tensor parallel."""
    several = [name for name, shape in ENGINES.items() if shape.ranks > 1]
    choices = [None, *several]
    return choices[(seed + (connector == "tcp")) % len(choices)]


def fault_of(seed: int, number: int, pairs: list[tuple[str, str]], longest_pause: float) -> Fault:
    """Return the fault of a round."""
    rng = random.Random(f"{seed}/{number}/fault")
    kind, target = pairs[number % len(pairs)]
    return Fault(kind, target, Moment.draw(rng), _pause(rng, longest_pause), rng.random())


def _pause(rng: random.Random, longest: float) -> float:
    """Return seconds: mostly short, now and then as long as allowed."""
    upper = rng.choices([1.0, 5.0, 20.0, longest], [60, 22, 14, 4])[0]
    return round(rng.uniform(0.1, min(upper, longest)), 2)


@dataclass
class Applied:
    """What a fault met. `victim`: in words, or why there was none. `processes`: those that were sent a signal."""

    victim: str
    hit: bool
    processes: tuple[Process, ...] = ()

    async def end(self, fault: Fault) -> None:
        """Wait until stopped processes have been continued."""
        if self.processes and fault.kind == "stop":
            try:
                await asyncio.sleep(fault.seconds)
            finally:
                for process in self.processes:
                    process.send(signal.SIGCONT)


async def apply(cluster: Cluster, fault: Fault) -> Applied:
    """Do it."""
    if fault.kind == "cut":
        return await _cut(cluster, fault)
    found = {name: Process.find(pid) for name, pid in (await _victims(cluster, fault)).items() if pid is not None}
    hit = {name: process for name, process in found.items() if process and process.send(SIGNALS[fault.kind])}
    if not hit:
        return Applied(f"no {fault.target} was there", False)
    met = " and ".join(f"{name}, pid {process.pid}" for name, process in hit.items())
    return Applied(f"{fault.target} of {met}", True, tuple(hit.values()))


async def _victims(cluster: Cluster, fault: Fault) -> dict[str, int | None]:
    """Return the victims' pids by the commands that they belong to."""
    if fault.target == "router":
        return {"router": await cluster.api_process("router")}
    names = [name for name, shape in ENGINES.items() if shape.role in fault.target] or list(ENGINES)
    if fault.target.endswith("rank"):
        names = [name for name in names if ENGINES[name].ranks > 1]
    if fault.target.startswith("both"):
        return {name: await _rank(cluster, name, 0) for name in names}
    name = names[int(fault.pick * len(names))]
    match fault.target.split()[-1]:
        case "leader":
            return {name: await _rank(cluster, name, 0)}
        case "rank":
            return {name: await _rank(cluster, name, 1)}
        case "api":
            return {name: await cluster.api_process(name)}
        case "server":
            return {name: cluster.fork_server(name)}
    return {name: cluster.commands[name].pid}


async def _rank(cluster: Cluster, name: str, number: int) -> int | None:
    engine = (await cluster.engines()).get(name)
    pids = [rank["pid"] for rank in engine["ranks"] if rank["rank"] == number] if engine is not None else []
    return next((pid for pid in pids if cluster.owner_of(pid) == name), None)


async def _cut(cluster: Cluster, fault: Fault) -> Applied:
    found = await links(cluster, fault.target)
    if not found:
        return Applied(f"no connection {fault.target}", False)
    who, connection = found[int(fault.pick * len(found))]
    gone = await cut(connection)
    return Applied(f"{who}, {connection.local} to {connection.remote}" + ("" if gone else ", still there"), gone)


async def links(cluster: Cluster, kind: str) -> list[tuple[str, Connection]]:
    """Return the connections of a kind between processes of the cluster, in an order that lasts."""
    ends = {(end.local, end.remote): end for end in await connections()}
    apis = {await cluster.api_process(name) for name in ENGINES}
    found = []
    for (local, remote), end in ends.items():
        other = ends.get((remote, local))
        if other is None:
            continue
        names = cluster.owner_of(end.pid), cluster.owner_of(other.pid)
        if None not in names and _link(names[0] or "", names[1] or "", bool({end.pid, other.pid} & apis)) == kind:
            found.append((f"{names[0]} to {names[1]}", end))
    return sorted(found, key=lambda pair: (pair[0], pair[1].local))


def _link(one: str, other: str, api: bool) -> str:
    roles = [ENGINES[name].role if name in ENGINES else name for name in (one, other)]
    if one == other:
        return "api to engine" if api else "within engine"
    for first, second in (roles, reversed(roles)):
        if f"{first} to {second}" in LINKS:
            return f"{first} to {second}"
    return ""
