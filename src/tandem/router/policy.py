"""Which engines take a request. Pure.

Load is what this frontend has sent and not seen the end of, plus what the engine says waits in its queue; among equals
the engine that was chosen least recently goes first. Pairs that refused each other are not made again. One whose
session was lost is made only where there is nothing else; its --kv-failure decides what becomes of the request.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from tandem.router.registry import EngineEntry


@dataclass(frozen=True, slots=True)
class Route:
    """Engines for one request. `prefill` is None when `decode` does everything itself, for `reason`."""

    decode: EngineEntry
    prefill: EngineEntry | None = None
    reason: str | None = None


def load(member: EngineEntry) -> tuple[int, int, int]:
    counts = member.status.requests
    return member.active + counts.waiting, counts.running, member.chosen


def sessions(prefills: Iterable[EngineEntry], decodes: Iterable[EngineEntry], state: str) -> dict[tuple[str, str], str]:
    """Pairs (prefill incarnation, decode incarnation) whose session is `refused` or `lost`, and why."""
    found = {}
    for decode in decodes:
        for prefill in prefills:
            peer = decode.peers.get((prefill.engine_id, prefill.incarnation))
            if peer is not None and peer.state == state:
                found[prefill.incarnation, decode.incarnation] = (
                    f"{decode.engine_id} cannot read from {prefill.engine_id}: {peer.error or peer.state}"
                )
    return found


def choose_route(members: Sequence[EngineEntry], exclude: Collection[str] = ()) -> Route | str:
    """The path for a new request, or why there is none.

    Args:
        members: all engines that are ready.
        exclude: incarnations not to use, because they failed this request before.
    """
    usable = [m for m in members if m.incarnation not in exclude]
    prefills = sorted((m for m in usable if m.role == "prefill"), key=load)
    decodes = sorted((m for m in usable if m.role == "decode"), key=load)
    mixed = sorted((m for m in usable if m.role == "mixed"), key=load)
    refused, lost = sessions(prefills, decodes, "refused"), sessions(prefills, decodes, "lost")
    pairs = [(p, d) for p in prefills for d in decodes if (p.incarnation, d.incarnation) not in refused]
    connected = [(p, d) for p, d in pairs if (p.incarnation, d.incarnation) not in lost]
    if not connected and mixed:
        return Route(mixed[0], reason="mixed engine")
    if pairs:
        prefill, decode = min(connected or pairs, key=lambda pair: (load(pair[0]), load(pair[1])))
        return Route(decode, prefill)
    return _nothing(prefills, decodes, refused)


def choose_route_of_one_model(
    members: Sequence[EngineEntry], exclude: Collection[str] = (), current: str | None = None
) -> tuple[Route | str, str | None]:
    """As `choose_route`, within the engines of one fingerprint: answers must not change with the engine that is free.

    Args:
        current: the fingerprint served until now. It stays as long as it has a path, so that engines with new
            weights under an old name take over when the last of the old ones have left.

    Returns the path, or why there is none, and the fingerprint that is served from now on.
    """
    known = dict.fromkeys(m.status.fingerprint for m in members)
    for fingerprint in sorted(known, key=lambda one: one != current):
        path = choose_route([m for m in members if m.status.fingerprint == fingerprint], exclude)
        if isinstance(path, Route):
            return path, fingerprint
    return _no_path(members, exclude), current


def _no_path(members: Sequence[EngineEntry], exclude: Collection[str]) -> str:
    path = choose_route(members, exclude)
    if isinstance(path, str):
        return path
    weights = ", ".join(f"{m.engine_id} ({m.role}) has {m.status.fingerprint}" for m in members)
    return f"no path through engines of the same weights: {weights}"


def _nothing(
    prefills: Sequence[EngineEntry], decodes: Sequence[EngineEntry], refused: dict[tuple[str, str], str]
) -> str:
    if refused:
        return "no prefill engine fits a decode engine: " + "; ".join(sorted(set(refused.values())))
    missing = [role for role, members in (("prefill", prefills), ("decode", decodes)) if not members]
    return f"no {' and no '.join(missing)} engine is ready"
