"""Choose the engines that take a request. Pure.

A prefill engine's load is the prompt tokens that it has still to compute, this request's own included: so a request
goes where the beginning of its prompt is cached, unless another engine is done with all of it sooner. The load of the
others is requests: those that this frontend has sent and not seen the end of, plus those in the engine's queue; a
prompt that is cached there is worth one. Among equals the engine that was chosen least recently goes first. Pairs that
refused each other are not made again. One whose session was lost is made only where there is nothing else; its
--kv-failure then decides about the request.

Where no prefill engine is ready, decode engines serve alone. Not where one is ready that a request has to avoid: an
overloaded one must not pass its load on to the engines that it is there to spare.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from tandem.router.engine_registry import EngineEntry, EngineRegistry


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a policy knows of a prompt: its length, and how much of its beginning engines have cached, in tokens."""

    tokens: int = 0
    cached: Mapping[str, int] = field(default_factory=dict)
    "By incarnation of the engine."

    def uncached(self, engine: EngineEntry) -> int:
        """Return the tokens that an engine would have to compute."""
        return self.tokens - min(self.tokens, self.cached.get(engine.incarnation, 0))

    def share_cached(self, engine: EngineEntry) -> float:
        return 1 - self.uncached(engine) / self.tokens if self.tokens else 0.0


ANY_PROMPT = Prompt()


@dataclass(frozen=True, slots=True)
class Route:
    """Engines for one request.

    Attributes:
        prefill: None when `decode` does everything itself, for `reason`.
        prompt_tokens: of the prompt, those that the prefill engine has to compute.
        is_makeshift: it is not there for that, but nobody else is.
    """

    decode: EngineEntry
    prefill: EngineEntry | None = None
    reason: str | None = None
    prompt_tokens: int = 0
    is_makeshift: bool = False


@dataclass(frozen=True, slots=True)
class NoRoute:
    """No engines can take a request now; `reason` is for people.

    `may_come`: engines are missing, and may come; else those that are there do not fit each other.
    """

    reason: str
    may_come: bool = True


class RoutingPolicy(Protocol):
    def choose(
        self, exclude: Collection[str] = (), fingerprint: str | None = None, prompt: Prompt = ANY_PROMPT
    ) -> Route | NoRoute:
        """Return the route for a request.

        Args:
            exclude: incarnations not to use, because they failed this request before.
            fingerprint: of the weights that made the tokens so far; None for a request that has none yet.
        """


class SingleEnginePolicy:
    """The policy of an engine's own API: that engine answers alone, whatever its role."""

    def __init__(self, registry: EngineRegistry) -> None:
        self._registry = registry

    def choose(
        self, exclude: Collection[str] = (), fingerprint: str | None = None, prompt: Prompt = ANY_PROMPT
    ) -> Route | NoRoute:
        for engine in self._registry.ready():
            if engine.incarnation not in exclude:
                return Route(engine, reason="sent to this engine directly")
        return NoRoute("the engine is not ready")


class OneModelPolicy:
    """The policy of a router: pairs and mixed engines of one model, and of one version of its weights.

    Answers must not change with the engine that is free. So the weights that are served stay as long as they have a
    route: engines with new weights under an old name take over when the last of the old ones have left. Decode engines
    serve alone only where no weights have a whole route.
    """

    def __init__(self, registry: EngineRegistry) -> None:
        self._registry = registry
        self._served_fingerprint: str | None = None

    def choose(
        self, exclude: Collection[str] = (), fingerprint: str | None = None, prompt: Prompt = ANY_PROMPT
    ) -> Route | NoRoute:
        served = self._registry.served()
        ready = self._registry.ready()
        engines = [one for one in ready if served is None or one.status.model == served.status.model]
        if fingerprint is not None:
            return choose_route([one for one in engines if one.status.fingerprint == fingerprint], exclude, prompt)
        route = self._choose_weights(engines, exclude, prompt)
        if isinstance(route, NoRoute) and served is not None and len(engines) < len(ready):
            others = f"{len(ready) - len(engines)} engines of other models than {served.status.model} are not used"
            return NoRoute(f"{route.reason}; {others}", route.may_come)
        return route

    def _choose_weights(
        self, engines: Sequence[EngineEntry], exclude: Collection[str], prompt: Prompt
    ) -> Route | NoRoute:
        of_weights: dict[str, list[EngineEntry]] = {}
        for engine in engines:
            of_weights.setdefault(engine.status.fingerprint, []).append(engine)
        order = sorted(of_weights, key=lambda one: one != self._served_fingerprint)
        none_prefills = not any(one.role == "prefill" for one in engines)
        for alone, fingerprint in itertools.product((False, True) if none_prefills else (False,), order):
            route = choose_route(of_weights[fingerprint], exclude, prompt, alone=alone)
            if isinstance(route, Route):
                if not exclude:  # what one request has to avoid changes nothing for the others
                    self._served_fingerprint = fingerprint
                return route
        route = choose_route(engines, exclude)
        if isinstance(route, NoRoute):
            return route
        weights = ", ".join(f"{one.engine_id} ({one.role}) has {one.status.fingerprint}" for one in engines)
        return NoRoute(f"no route through engines of the same weights: {weights}")


def choose_route(
    engines: Sequence[EngineEntry], exclude: Collection[str] = (), prompt: Prompt = ANY_PROMPT, *, alone: bool = True
) -> Route | NoRoute:
    """Return the route with the least to compute and the least load among engines that are ready, of any weights.

    `alone`: a decode engine may do it all where there is no prefill engine.
    """
    usable = sorted((one for one in engines if one.incarnation not in exclude), key=partial(_load, prompt))
    prefills = sorted((one for one in usable if one.role == "prefill"), key=partial(_prompt_tokens, prompt))  # stable
    decodes = [one for one in usable if one.role == "decode"]
    mixed = [one for one in usable if one.role == "mixed"]
    connected = _first_pair(prefills, decodes, ("refused", "lost"))
    if connected is None and mixed:
        return Route(mixed[0], reason="mixed engine")
    pair = connected or _first_pair(prefills, decodes, ("refused",))
    if pair is not None:
        return Route(pair[1], pair[0], prompt_tokens=prompt.uncached(pair[0]))
    if prefills and decodes:
        refusals = {_refusal(p, d) for p in prefills for d in decodes}
        return NoRoute("no prefill engine fits a decode engine: " + "; ".join(sorted(refusals)), may_come=False)
    if alone and decodes and not any(one.role == "prefill" for one in engines):
        return Route(decodes[0], reason="no prefill engine is ready", is_makeshift=True)
    missing = [role for role, found in (("prefill", prefills), ("decode", decodes)) if not found]
    return NoRoute(f"no {' and no '.join(missing)} engine is ready")


def _first_pair(
    prefills: Sequence[EngineEntry], decodes: Sequence[EngineEntry], without: Collection[str]
) -> tuple[EngineEntry, EngineEntry] | None:
    """Return the first pair in the order of the prefill, then of the decode engines whose session is in no such state.

    It comes to an end at the first one: with hundreds of engines there are too many pairs to look at for each request.
    """
    pairs = ((prefill, decode) for prefill in prefills for decode in decodes)
    return next((pair for pair in pairs if _session_state(*pair) not in without), None)


def _load(prompt: Prompt, engine: EngineEntry) -> tuple[float, int, int]:
    counts = engine.status.requests
    requests = engine.active + counts.waiting - prompt.share_cached(engine)
    return requests, counts.running, engine.last_chosen


def _prompt_tokens(prompt: Prompt, engine: EngineEntry) -> int:
    """Return the tokens that a prefill engine has to compute until this prompt is done; of others' we guess."""
    counts = engine.status.requests
    of_others = max(0, counts.waiting + counts.running - engine.active)
    return engine.prompt_tokens + of_others * prompt.tokens + prompt.uncached(engine)


def _session_state(prefill: EngineEntry, decode: EngineEntry) -> str | None:
    peer = decode.peers.get((prefill.engine_id, prefill.incarnation))
    return peer.state if peer is not None else None


def _refusal(prefill: EngineEntry, decode: EngineEntry) -> str:
    peer = decode.peers[prefill.engine_id, prefill.incarnation]
    return f"{decode.engine_id} cannot read from {prefill.engine_id}: {peer.error or peer.state}"
