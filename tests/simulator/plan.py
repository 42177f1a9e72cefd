"""A schedule: engines, routers, requests and faults, drawn from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from tandem.config import KvFailure
from tandem.wire.control_messages import Role
from tests.simulator.model import VOCABULARY
from tests.simulator.reads import ReadProfile

FaultKind = Literal["kill", "pause", "cut", "break", "leave"]

SHAPES = ((1, 1), (1, 1), (2, 1), (1, 2))
BLOCK_SIZES = (2, 3, 4, 4, 8)
MAX_PROMPT = 20
MAX_TOKENS = 10


@dataclass(frozen=True, slots=True)
class EngineSpec:
    name: str
    role: Role
    tp: int
    pp: int
    block_size: int
    blocks: int
    max_num_seqs: int
    max_batched_tokens: int
    token_major: bool
    salt: int
    step_seconds: float
    rate: float


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """A client and its request.

    Attributes:
        router: number of the router that it asks.
        leaves: seconds after which the client goes away, if it does.
    """

    at: float
    router: int
    prompt: tuple[int, ...]
    max_tokens: int
    min_tokens: int
    leaves: float | None


@dataclass(frozen=True, slots=True)
class Fault:
    """Something breaks, between `at` and `until`: a process (`one`), or what is between two."""

    at: float
    until: float
    kind: FaultKind
    one: str
    other: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    engines: tuple[EngineSpec, ...]
    routers: int
    requests: tuple[RequestSpec, ...]
    faults: tuple[Fault, ...]
    reads: ReadProfile
    kv_failure: KvFailure
    lease_ttl: float
    request_timeout: float
    slowest: float
    spikes: float
    duplicates: float
    same_address: bool

    @property
    def quiet_from(self) -> float:
        """When nothing breaks any more."""
        return max((fault.until for fault in self.faults), default=0.0)

    @property
    def only_drained(self) -> bool:
        """Whether engines are stopped in good order and are soon back, and nothing else happens."""
        leave = bool(self.faults) and {fault.kind for fault in self.faults} == {"leave"}
        return leave and all(fault.until - fault.at <= 1.0 for fault in self.faults) and not self.reads.failing

    @property
    def nothing_breaks(self) -> bool:
        return not self.faults and not self.reads.failing


def router_name(number: int) -> str:
    return f"router-{number}"


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What a deployment is taken to be like.

    Attributes:
        skew: most by which the rate of a clock differs from true time, as a fraction.
        diverge: engines always choose different tokens after the same ones now and then, as with other batches or
            shapes in bf16; else they do so in some plans.
        tight: memory is short also where two routers share engines (decision 13).
    """

    skew: float = 0.001
    diverge: bool = False
    tight: bool = False


DEFAULT = Assumptions()


def draw(seed: int, assumptions: Assumptions = DEFAULT) -> Plan:
    """Return the schedule of a seed."""
    chance = random.Random(seed)
    routers = 2 if chance.random() < 0.25 else 1
    engines = _engines(chance, assumptions, roomy=routers > 1 and not assumptions.tight)
    lease_ttl = chance.choice((1.0, 1.0, 2.0))
    kind = chance.choices(("any", "reads", "leases", "drain"), (6, 4, 3, 1))[0]
    requests = _requests(chance, routers)
    match kind:
        case "leases":
            faults = _lease_faults(chance, engines, lease_ttl)
        case "drain":
            faults = _drains(chance, engines)
        case _:
            faults = _faults(chance, engines, routers)
    return Plan(
        engines=engines,
        routers=routers,
        requests=requests,
        faults=faults,
        reads=_reads(chance, kind),
        kv_failure=chance.choice(("recompute", "recompute", "recompute", "retry", "fail")),
        lease_ttl=lease_ttl,
        request_timeout=chance.choice((5.0, 20.0)) if kind != "drain" and (faults or kind == "reads") else 60.0,
        slowest=chance.choice((0.001, 0.005, 0.03)),
        spikes=chance.choice((0.0, 0.02, 0.1)),
        duplicates=chance.choice((0.0, 0.5)),
        same_address=chance.random() < 0.5,
    )


def _reads(chance: random.Random, kind: str) -> ReadProfile:
    """Return how reads end. Plans of the kind "reads" have bad ones, those of the kind "leases" slow ones."""
    return ReadProfile(
        one_sided=chance.random() < 0.7,
        own_network=chance.random() < 0.5,
        slow={"reads": 0.2, "leases": 0.5}.get(kind, 0.0),
        failing=0.15 if kind == "reads" else 0.0,
        hanging=0.05 if kind == "reads" else 0.0,
    )


def _lease_faults(chance: random.Random, engines: tuple[EngineSpec, ...], ttl: float) -> tuple[Fault, ...]:
    """Let engines lose sight of each other for about as long as a lease lasts, while they read."""
    faults = []
    for _ in range(chance.choice((1, 2))):
        at, seconds = chance.uniform(1.0, 2.6), ttl * chance.uniform(0.5, 3.0)
        one = chance.choice([spec.name for spec in engines if spec.role != "prefill"])
        other = chance.choice([spec.name for spec in engines if spec.role != "decode"])
        both = chance.random() < 0.5  # nobody can tell the reader that its lease is over when it wakes up
        if one != other and (both or chance.random() < 0.3):
            faults.append(Fault(at, at + 1.5 * seconds, "cut", one, other))
        if one == other or both or chance.random() < 0.7:
            faults.append(Fault(at, at + seconds, "pause", one))
    return tuple(sorted(faults, key=lambda fault: fault.at))


def _drains(chance: random.Random, engines: tuple[EngineSpec, ...]) -> tuple[Fault, ...]:
    """Restart engines in good order while requests come."""
    chosen = chance.sample(engines, chance.randrange(1, len(engines) + 1))
    times = [chance.uniform(0.9, 2.3) for _ in chosen]
    return tuple(Fault(at, at + 0.5, "leave", spec.name) for at, spec in zip(sorted(times), chosen, strict=True))


def _engines(chance: random.Random, assumptions: Assumptions, *, roomy: bool) -> tuple[EngineSpec, ...]:
    roles: tuple[Role, ...] = chance.choice(
        (
            ("prefill", "decode"),
            ("prefill", "decode"),
            ("prefill", "prefill", "decode"),
            ("prefill", "decode", "decode"),
            ("prefill", "prefill", "decode", "decode"),
            ("mixed",),
            ("prefill", "decode", "mixed"),
        )
    )
    salts = random.Random(chance.random())
    diverge = assumptions.diverge or salts.random() < 0.3
    specs = []
    for number, role in enumerate(roles):
        tp, pp = chance.choice(SHAPES)
        size = chance.choice(BLOCK_SIZES)
        least = -(-(MAX_PROMPT + MAX_TOKENS + 1) // size)
        specs.append(
            EngineSpec(
                name=f"{role}-{number}",
                role=role,
                tp=tp,
                pp=pp,
                block_size=size,
                blocks=least + chance.choice((0, 2, least)) + (9 * least if roomy else 0),
                max_num_seqs=chance.choice((1, 2, 4)),
                max_batched_tokens=chance.choice((4, 8, 16)),
                token_major=chance.random() < 0.3,
                salt=salts.randrange(1, VOCABULARY) if diverge else 0,
                step_seconds=chance.choice((0.001, 0.01, 0.08)),
                rate=1.0 + chance.uniform(-assumptions.skew, assumptions.skew),
            )
        )
    return tuple(specs)


def _requests(chance: random.Random, routers: int) -> tuple[RequestSpec, ...]:
    stems = [tuple(chance.randrange(40, VOCABULARY) for _ in range(MAX_PROMPT)) for _ in range(2)]
    specs = []
    for _ in range(chance.choice((1, 2, 3, 5, 8))):
        length = chance.randrange(1, MAX_PROMPT + 1)
        kept = chance.randrange(0, length + 1)
        own = tuple(chance.randrange(40, VOCABULARY) for _ in range(length - kept))
        max_tokens = chance.randrange(1, MAX_TOKENS + 1)
        specs.append(
            RequestSpec(
                at=chance.uniform(1.0, 2.2),
                router=chance.randrange(routers),
                prompt=(chance.choice(stems)[:kept] + own),
                max_tokens=max_tokens,
                min_tokens=chance.choice((0, 0, max_tokens)),
                leaves=chance.uniform(0.0, 1.0) if chance.random() < 0.15 else None,
            )
        )
    return tuple(sorted(specs, key=lambda spec: spec.at))


def _faults(chance: random.Random, engines: tuple[EngineSpec, ...], routers: int) -> tuple[Fault, ...]:
    names = [spec.name for spec in engines]
    everybody = names + [router_name(number) for number in range(routers)]
    faults = []
    for _ in range(chance.choice((0, 0, 1, 1, 1, 2, 3))):
        kind: FaultKind = chance.choice(("kill", "pause", "pause", "cut", "cut", "break", "break", "leave"))
        at = chance.uniform(0.2, 3.2) if chance.random() < 0.5 else chance.uniform(1.0, 2.3)
        seconds = chance.choice((0.05, 0.3, 0.8, 1.5, 3.0, 9.0)) * chance.uniform(0.5, 1.5)
        if kind in ("cut", "break"):
            one, other = chance.sample(everybody, 2)
            faults.append(Fault(at, at if kind == "break" else at + seconds, kind, one, other))
        elif kind == "leave":
            faults.append(Fault(at, at + min(seconds, 3.0), kind, chance.choice(names)))
        else:
            one = chance.choice(everybody)
            faults.append(Fault(at, at + (min(seconds, 3.0) if kind == "kill" else seconds), kind, one))
    return tuple(sorted(faults, key=lambda fault: fault.at))
