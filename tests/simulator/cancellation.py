"""How long both engines keep blocks of a request whose client has left, at every moment of its life."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

from tandem.wire.control_messages import Role
from tests.simulator.model import VOCABULARY
from tests.simulator.plan import MAX_PROMPT, MAX_TOKENS, EngineSpec, Plan, RequestSpec
from tests.simulator.reads import ReadProfile
from tests.simulator.simulation import Simulation, simulated_time

ASKED_AT = 1.0
LOOK_SECONDS = 0.001
NETWORK_SECONDS = 0.001
"""Most that a message takes."""
PATIENCE = 2.0


@dataclass(frozen=True)
class Setting:
    """What a request meets.

    Attributes:
        step_seconds: of both engines.
        slow: share of the reads that take long.
        rival: another client's request comes first and keeps the engines' only running slot.
    """

    step_seconds: float
    pp: int = 1
    slow: float = 0.0
    rival: bool = False


@dataclass(frozen=True)
class Cancelled:
    """What a client's leaving met.

    Attributes:
        state: of the request, on each engine.
        seconds: until nothing was held for it anywhere, but blocks into which a read may still write.
        writable: until no such block was left either. A read cannot be called back.
    """

    state: str
    seconds: float
    writable: float


def cancel(setting: Setting, leaves: float, seed: int) -> Cancelled | None:
    """Let the client leave so many seconds after it has asked, in virtual time; None if it had its answer by then."""
    plan = _plan(setting, leaves)
    simulation = Simulation(seed, plan)
    world = simulation.world
    with simulated_time() as worlds:
        worlds.append(world)
        asyncio._set_running_loop(world.loop.itself)
        simulation._start_router("router-0")
        for spec in plan.engines:
            simulation._start_engine(spec)
        for request in plan.requests:
            world.at(request.at, lambda r=request: simulation._ask(r))  # type: ignore[misc]
        left_at = ASKED_AT + leaves
        world.run(left_at - LOOK_SECONDS / 2)
        answer = simulation.answers[-1]
        ended, state = answer.ended is not None, _state(simulation)
        world.run(left_at)
        seconds = _until_free(simulation, left_at, writable=True)
        writable = _until_free(simulation, left_at, writable=False)
        for process in simulation._processes():
            process.kill()
    assert not world.failures, world.failures
    return None if ended else Cancelled(state, seconds, writable)


def _until_free(simulation: Simulation, since: float, *, writable: bool) -> float:
    """Return the seconds from `since` until nothing is held for the request, `writable`: but blocks in quarantine."""
    world = simulation.world
    while _holds(simulation, writable=writable) and world.now < since + PATIENCE:
        world.run(world.now + LOOK_SECONDS)
    return world.now - since


def _holds(simulation: Simulation, *, writable: bool) -> bool:
    ours = f"request-{len(simulation.answers) - 1}-"
    for engine in simulation.engines.values():
        known = [*engine.scheduler.state.requests, *engine.step_loop._leased]
        quarantined = [] if writable else list(engine.scheduler.state.quarantined)
        if any(request_id.startswith(ours) for request_id in [*known, *quarantined]):
            return True
        usage, waiting = engine.pool.usage(), engine.scheduler.state.quarantined.values()
        if len(simulation.answers) == 1 and usage.in_use + usage.leased > sum(map(len, waiting)):
            return True
    return False


def _state(simulation: Simulation) -> str:
    ours = f"request-{len(simulation.answers) - 1}-"
    found = []
    for name, engine in simulation.engines.items():
        for request_id, request in engine.scheduler.state.requests.items():
            if request_id.startswith(ours):
                found.append(f"{name} {request.state.name.lower()}")
        if any(request_id.startswith(ours) for request_id in engine.step_loop._leased):
            found.append(f"{name} leased")
    return ", ".join(found) or "between"


def _plan(setting: Setting, leaves: float) -> Plan:
    def engine(role: Role) -> EngineSpec:
        return EngineSpec(
            name=role,
            role=role,
            tp=1,
            pp=setting.pp,
            block_size=4,
            blocks=64,
            max_num_seqs=1 if setting.rival else 4,
            max_batched_tokens=4,
            token_major=False,
            salt=0,
            step_seconds=setting.step_seconds,
            rate=1.0,
        )

    prompt = tuple(40 + number % (VOCABULARY - 40) for number in range(MAX_PROMPT))
    request = RequestSpec(ASKED_AT, 0, prompt, MAX_TOKENS, MAX_TOKENS, leaves)
    rival = replace(request, at=ASKED_AT - 0.002, prompt=tuple(reversed(prompt)), leaves=None)
    return Plan(
        engines=(engine("prefill"), engine("decode")),
        routers=1,
        requests=(rival, request) if setting.rival else (request,),
        faults=(),
        reads=ReadProfile(one_sided=True, own_network=False, slow=setting.slow, failing=0.0, hanging=0.0),
        kv_failure="recompute",
        lease_ttl=1.0,
        request_timeout=60.0,
        slowest=NETWORK_SECONDS,
        spikes=0.0,
        duplicates=0.0,
        same_address=True,
    )
