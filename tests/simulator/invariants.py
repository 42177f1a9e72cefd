"""What must hold when everything is quiet, and of every answer."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from tandem.engine.io.frontends import Frontend
from tandem.errors import InvalidRequest, KvLost, KvRetry, Overloaded, RequestError
from tandem.router.attempt import GRACE_SECONDS
from tests.simulator.engine import SimEngine
from tests.simulator.frontend import Answer, SimRouter
from tests.simulator.model import EOS, contradiction
from tests.simulator.plan import Plan

SLACK_SECONDS = 0.5


def busy(engine: SimEngine, living: Collection[str]) -> Iterator[str]:
    """Yield what an engine still has of requests that have all ended.

    Args:
        living: incarnations of the engines that are there.
    """
    name, scheduler, usage = engine.spec.name, engine.scheduler, engine.pool.usage()
    if scheduler.state.requests:
        yield f"{name} has requests {list(scheduler.state.requests)}"
    if scheduler.state.quarantined:
        yield f"{name} has blocks in quarantine for {list(scheduler.state.quarantined)}"
    if usage.in_use or usage.leased or usage.quarantined:
        yield f"{name} has {usage}"
    loop, step_loop = engine.event_loop, engine.step_loop
    if step_loop._requests or step_loop._leased:
        yield f"the step loop of {name} knows {list(step_loop._requests)} and leases {list(step_loop._leased)}"
    offers = loop._listener._offers
    if len(offers) or offers._early or offers._leases._leases:
        yield f"{name} has {len(offers)} offers, {offers._early} early claims, leases {list(offers._leases._leases)}"
    for frontend in loop._frontends:
        if frontend._active:
            yield f"{name} works for {frontend._address} on {sorted(frontend._active)}"
    yield from _busy_reader(engine, living)


def _busy_reader(engine: SimEngine, living: Collection[str]) -> Iterator[str]:
    name, pulls = engine.spec.name, engine.event_loop._dialer._pulls
    if len(pulls) or pulls._jobs:
        yield f"{name} pulls {list(pulls._pulls)} with jobs {list(pulls._jobs)}"
    sessions = pulls._sessions._by_number
    for session in sessions.values():
        if (session.incarnation or session.target.incarnation) not in living:
            yield f"{name} has a session ({session.state.value}) with a dead incarnation of {session.target.engine_id}"
        if session.pulls or session._leases._leases:
            yield f"session {session.number} of {name} has pulls {list(session.pulls)}"
    connections = engine.event_loop._dialer._connections
    if not set(connections) <= set(sessions):
        yield f"{name} has connections {sorted(connections)} for sessions {sorted(sessions)}"
    for rank, (thread, transport) in enumerate(zip(engine.threads, engine.transports, strict=True)):
        if thread._jobs or not transport.quiet:
            yield f"rank {rank} of {name} has reads in progress"
        stale = [number for number in thread._peers if number not in connections]
        if stale:
            yield f"rank {rank} of {name} has peers of sessions {stale}, which are over"
        dead = [agent for agent in transport.connected if agent.split("/")[1] not in living]
        if dead:
            yield f"rank {rank} of {name} is connected to {dead}"


def not_whole(router: SimRouter, engines: Collection[SimEngine]) -> Iterator[str]:
    """Yield what keeps a router from using its engines, or what it still holds."""
    if router.connections._streams:
        yield f"{router.process.name} has streams {list(router.connections._streams)}"
    known = {entry.incarnation: entry for entry in router.registry.ready()}
    for engine in engines:
        entry = known.get(engine.identity.incarnation)
        if entry is None:
            yield f"{router.process.name} does not use {engine.identity}"
        elif entry.active:
            yield f"{router.process.name} counts {entry.active} requests on {engine.spec.name}"
        elif entry.register.connection != _frontend(router, engine)._breaks:
            yield f"{engine.spec.name} has not registered with {router.process.name} since their connection broke"


def _frontend(router: SimRouter, engine: SimEngine) -> Frontend:
    return next(one for one in engine.event_loop._frontends if one._address.host == router.process.name)


def needless_losses(engine: SimEngine) -> str | None:
    """Return what an engine has lost, where nothing broke."""
    loop = engine.event_loop
    if loop._listener.expired or loop._dialer.failures:
        lost = f"{loop._listener.expired} leases ran out, {loop._dialer.failures} pulls failed"
        return f"nothing broke; {engine.spec.name}: {lost}"
    return None


def not_connected(engines: Collection[SimEngine]) -> Iterator[str]:
    """Yield which decode engines cannot read from which prefill engines."""
    for reader in (one for one in engines if one.spec.role == "decode"):
        peers = {(peer.engine_id, peer.incarnation): peer for peer in reader.event_loop._dialer.peers}
        for source in (one for one in engines if one.spec.role == "prefill"):
            peer = peers.get((source.spec.name, source.identity.incarnation))
            if peer is None or peer.state != "ready":
                yield f"{reader.spec.name} has no session with {source.spec.name}: {peer}"


def wrong_answer(answer: Answer, plan: Plan) -> str | None:
    """Return what is wrong with an answer that has ended; None if nothing is."""
    spec, tokens = answer.spec, answer.tokens
    name = f"request {answer.number}"
    salts = [0] if all(not one.salt for one in plan.engines) else [one.salt for one in plan.engines]
    wrong = contradiction(spec.prompt, tokens, spec.min_tokens, salts)
    if wrong is not None:
        return f"{name}: {wrong}"
    early = [token for index, token in enumerate(tokens[:-1]) if token in EOS and index >= spec.min_tokens]
    if early or len(tokens) > spec.max_tokens:
        return f"{name} goes on after its end: {tokens}, at most {spec.max_tokens}"
    most = plan.request_timeout + GRACE_SECONDS + SLACK_SECONDS
    if answer.seconds > most:
        return f"{name} ended ({answer.ended}) after {answer.seconds:.2f} s; it has {most:.1f}"
    if answer.error is not None:
        return _wrong_error(answer, answer.error, plan)
    stops = bool(tokens) and tokens[-1] in EOS and len(tokens) > spec.min_tokens
    match answer.ended:
        case "stop" if not stops:
            return f"{name} stops without reason: {tokens}"
        case "length" if len(tokens) != spec.max_tokens or stops:
            return f"{name} ended as too long with {len(tokens)} of {spec.max_tokens} tokens"
        case "stop" | "length" | "left" | "router died" | "no router":
            return None
    return f"{name} ended so: {answer.ended}"


def _wrong_error(answer: Answer, error: RequestError, plan: Plan) -> str | None:
    text = f"request {answer.number} ended with {type(error).__name__}: {error}"
    if isinstance(error, InvalidRequest) or type(error) is RequestError:
        return text
    by_policy = {"recompute": (), "retry": (KvRetry,), "fail": (KvLost,)}[plan.kv_failure]
    if isinstance(error, (Overloaded, *by_policy)):
        return None
    if plan.only_drained and plan.routers == 1 and not plan.spikes:
        return f"engines were only drained, and {text}"
    if plan.nothing_breaks:
        return f"nothing broke, and {text}"
    return None
