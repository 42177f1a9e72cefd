"""Runs one schedule: starts everything, lets it break, waits until it is quiet, and judges."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from tandem.engine.io import event_loop, event_loop_thread
from tandem.router import connection_monitor, engine_connections
from tandem.wire.messages import Address
from tests.simulator.engine import SimEngine, SimEventLoopThread
from tests.simulator.frontend import Answer, SimRouter
from tests.simulator.invariants import busy, needless_losses, not_connected, not_whole, wrong_answer
from tests.simulator.network import LATE_SECONDS, Network
from tests.simulator.plan import DEFAULT, Assumptions, EngineSpec, Fault, Plan, RequestSpec, draw, router_name
from tests.simulator.reads import Fabric
from tests.simulator.sockets import SimConnectionMonitor
from tests.simulator.world import Process, World

LOOK_SECONDS = 0.25
SETTLE_SECONDS = 45.0
"""From the last fault, or the last request's end, until everything must be quiet and whole again."""
CANCEL_SECONDS = 0.25
CALM_LOOKS = 3
"""In a row: what a pause has done shows a moment after it."""


@dataclass(slots=True)
class Result:
    """How a schedule went.

    Attributes:
        failures: what must not happen and did.
        ends: requests by the way in which they ended.
        seconds: of virtual time.
    """

    seed: int
    plan: Plan
    failures: list[str]
    ends: dict[str, int]
    events: int
    seconds: float
    trace: list[str] = field(default_factory=list)


class Simulation:
    def __init__(self, seed: int, plan: Plan, *, verbose: bool = False) -> None:
        self.plan = plan
        self.world = World(seed, verbose=verbose)
        self.network = Network(self.world, plan.slowest, plan.spikes, plan.duplicates)
        self.fabric = Fabric(self.world, self.network, plan.reads, plan.lease_ttl)
        self.engines: dict[str, SimEngine] = {}
        self.routers: dict[str, SimRouter] = {}
        self.answers: list[Answer] = []
        self._ports = 1
        self._addresses: dict[str, Address] = {}
        self._specs = {spec.name: spec for spec in plan.engines}

    def run(self) -> None:
        world, plan = self.world, self.plan
        for number in range(plan.routers):
            self._start_router(router_name(number))
        for spec in plan.engines:
            world.at(world.random.uniform(0.0, 0.2), lambda s=spec: self._start_engine(s))  # type: ignore[misc]
        for request in plan.requests:
            world.at(request.at, lambda r=request: self._ask(r))  # type: ignore[misc]
        for fault in plan.faults:
            world.at(fault.at, lambda f=fault: self._begin(f))  # type: ignore[misc]
        world.run(max(plan.quiet_from, plan.requests[-1].at) + 0.01)
        self._settle()
        if not world.failures:
            self._probe()
        self._judge()
        for process in self._processes():
            if not process.dead:
                process.kill()

    # --- beginnings and faults -----------------------------------------------------------------------------------

    def _processes(self) -> list[Process]:
        return [engine.process for engine in self.engines.values()] + [
            router.process for router in self.routers.values()
        ]

    def _process(self, name: str) -> Process | None:
        owner = self.engines.get(name) or self.routers.get(name)
        return owner.process if owner is not None else None

    def _address(self, name: str) -> Address:
        if name not in self._addresses or not (name.startswith("router") or self.plan.same_address):
            self._ports += 10
            self._addresses[name] = Address(name, self._ports)
        return self._addresses[name]

    def _start_router(self, name: str) -> None:
        self.routers[name] = SimRouter(self.world, self.network, self.plan, name, self._address(name))

    def _start_engine(self, spec: EngineSpec) -> None:
        routers = [self._addresses[router_name(number)] for number in range(self.plan.routers)]
        address = self._address(spec.name)
        engine = SimEngine(self.world, self.network, self.fabric, self.plan, spec, address, routers)
        self.engines[spec.name] = engine
        self.world.note(f"{engine.identity} starts")

    def _ask(self, spec: RequestSpec) -> Answer:
        answer = Answer(len(self.answers), spec)
        self.answers.append(answer)
        router = self.routers[router_name(spec.router)]
        if router.process.dead:
            answer.ended = "no router"
            return answer
        router.ask(answer)
        if spec.leaves is not None:
            self.world.after(spec.leaves, lambda: router.leave(answer))
            if self.plan.nothing_breaks and not self.plan.spikes:
                self.world.after(spec.leaves + CANCEL_SECONDS, lambda: self._check_cancelled(answer))
        return answer

    def _check_cancelled(self, answer: Answer) -> None:
        for engine in self.engines.values():
            for request_id in engine.scheduler.state.requests:
                if answer.ended == "left" and request_id.startswith(f"request-{answer.number}-"):
                    self.world.fail(f"{engine.spec.name} still works on {request_id}, whose client has left")

    def _begin(self, fault: Fault) -> None:
        self.world.note(f"FAULT {fault}")
        process = self._process(fault.one)
        match fault.kind:
            case "cut":
                self.network.cut(fault.one, fault.other)
                self.world.at(fault.until, lambda: self.network.heal(fault.one, fault.other))
            case "break":
                self.network.break_connections(fault.one, fault.other)
            case "pause":
                if process is not None and not process.dead and not process.paused:
                    self.network.pause(process)
                    self.world.at(fault.until, process.resume)
            case "kill":
                self._kill(fault.one, fault.until)
            case "leave":
                engine = self.engines.get(fault.one)
                if engine is not None and not engine.process.dead:
                    engine.leave()
                    self.world.at(fault.until, lambda: self._restart(fault.one, engine.process))

    def _kill(self, name: str, until: float) -> None:
        process = self._process(name)
        if process is None or process.dead:
            return
        router = self.routers.get(name)
        if router is not None:
            router.dies()
        self.network.kill(process)
        self.world.at(until, lambda: self._restart(name, process))

    def _restart(self, name: str, earlier: Process) -> None:
        if self._process(name) is not earlier:
            return
        if not earlier.dead:  # it leaves, and is not done with that
            self.world.after(0.5, lambda: self._restart(name, earlier))
        elif name in self._specs:
            self._start_engine(self._specs[name])
        else:
            self._start_router(name)

    # --- the end -------------------------------------------------------------------------------------------------

    def _unrest(self) -> Iterator[str]:
        """Yield what is not quiet, or not whole."""
        for answer in self.answers:
            if answer.ended is None:
                yield f"request {answer.number} has not ended: {answer.tokens}"
        for process in self._processes():
            if process.dead or process.paused:
                yield f"{process.name} is not there"
        if len(self.engines) < len(self.plan.engines):
            yield "an engine has not started"
        engines = list(self.engines.values())
        living = {engine.identity.incarnation for engine in engines}
        for engine in engines:
            yield from busy(engine, living)
        yield from not_connected(engines)
        for router in self.routers.values():
            yield from not_whole(router, engines)

    def _settle(self) -> None:
        world, calm = self.world, 0
        deadline = world.now + SETTLE_SECONDS + self.plan.request_timeout
        while not world.failures:
            calm = calm + 1 if next(self._unrest(), None) is None else 0
            if calm == CALM_LOOKS:
                return
            if world.now > deadline:
                world.fail("; ".join(self._unrest()))
                return
            world.run(world.now + LOOK_SECONDS)

    def _probe(self) -> None:
        """Ask every router once more: everything is well, so the answer has to be right."""
        self.fabric.profile = replace(self.plan.reads, slow=0.0, failing=0.0, hanging=0.0)
        self.network.spikes = 0.0
        self.world.run(self.world.now + 2 * LATE_SECONDS)  # what was asked before may be late, and its answer
        self._settle()
        for number in range(self.plan.routers):
            spec = RequestSpec(self.world.now, number, (50, 51, 52, 53, 54), 4, 4, None)
            answer = self._ask(spec)
            self._settle()
            if not self.world.failures and answer.ended != "length":
                self.world.fail(f"all is well, and a request ends with {answer.ended}: {answer.error}")

    def _judge(self) -> None:
        left = any(answer.ended == "left" for answer in self.answers)  # a prompt that is aborted fails its pull
        for engine in self.engines.values():
            lost = needless_losses(engine) if self.plan.nothing_breaks and not self.plan.spikes and not left else None
            if lost is not None:
                self.world.fail(lost)
        for answer in self.answers:
            if answer.ended is not None:
                wrong = wrong_answer(answer, self.plan)
                if wrong is not None:
                    self.world.fail(wrong)


class _TraceLogs(logging.Handler):
    def __init__(self, world: World) -> None:
        super().__init__(logging.INFO)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        self._world.note(f"LOG {record.getMessage()}")


@contextlib.contextmanager
def simulated_time(handler: logging.Handler | None = None) -> Iterator[list[World]]:
    """Let `time.monotonic`, random ids and the leader's thread belong to the world that is put into the list."""
    worlds: list[World] = []
    before = time.monotonic, uuid.uuid4, logging.root.manager.disable
    time.monotonic = lambda: worlds[-1].monotonic()
    uuid.uuid4 = lambda: uuid.UUID(int=worlds[-1].random.getrandbits(128))
    setattr(event_loop, "EventLoopThread", SimEventLoopThread)  # noqa: B010
    setattr(engine_connections, "ConnectionMonitor", SimConnectionMonitor)  # noqa: B010
    collecting = gc.isenabled()
    gc.disable()
    logging.disable(logging.CRITICAL if handler is None else logging.NOTSET)
    if handler is not None:
        logging.root.addHandler(handler)
    try:
        yield worlds
    finally:
        time.monotonic, uuid.uuid4, disabled = before
        setattr(event_loop, "EventLoopThread", event_loop_thread.EventLoopThread)  # noqa: B010
        setattr(engine_connections, "ConnectionMonitor", connection_monitor.ConnectionMonitor)  # noqa: B010
        logging.disable(disabled)
        if handler is not None:
            logging.root.removeHandler(handler)
        asyncio._set_running_loop(None)
        if collecting:
            gc.enable()


def run_schedule(seed: int, assumptions: Assumptions = DEFAULT, *, verbose: bool = False) -> Result:
    """Run the schedule of a seed. The same seed goes the same way."""
    plan = draw(seed, assumptions)
    simulation = Simulation(seed, plan, verbose=verbose)
    world = simulation.world
    with simulated_time(_TraceLogs(world) if verbose else None) as worlds:
        worlds.append(world)
        asyncio._set_running_loop(world.loop.itself)
        try:
            simulation.run()
        except Exception as error:
            if not world.failures:
                world.fail(f"an error of our own: {error!r}")
            if verbose:
                raise
    ends: dict[str, int] = {}
    for answer in simulation.answers:
        ends[answer.ended or "hangs"] = ends.get(answer.ended or "hangs", 0) + 1
    return Result(seed, plan, world.failures, ends, world.events, world.now, world.lines)
