"""Prefill and decode engines of a router: which work together, and what to do about those that do not. Pure."""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tandem.wire.addresses import is_loopback
from tandem.wire.engine_status import EngineStatus, PeerInfo

SHORT = 12


class ListedEngine(EngineStatus, frozen=True, kw_only=True):
    """An engine as GET /tandem/engines lists it.

    Attributes:
        state: what the router thinks of it: ready, stalled, draining or lost.
        reason: why it is not used for new requests.
        peer_address: HOST:PORT where other engines shake hands with it.
    """

    state: str
    reason: str | None = None
    dtype: str = "?"
    version: str = "?"
    peer_address: str = "?"

    @property
    def ready(self) -> bool:
        return self.state == "ready"

    @property
    def nodes(self) -> list[str]:
        return sorted({rank.node for rank in self.ranks if rank.node})


class PairState(enum.Enum):
    """READY: KV can move. WAITING: not yet. The others are of no use."""

    READY = "ready"
    WAITING = "connecting"
    REFUSED = "refused"
    LOST = "lost"
    ABSENT = "engine absent"


@dataclass(frozen=True, slots=True)
class Pair:
    """`why`: the reason that the engines give; `advice`: what a person can do. Both empty where all is well."""

    prefill: ListedEngine
    decode: ListedEngine
    state: PairState
    why: str = ""
    advice: str = ""


def engine_pairs(engines: Sequence[ListedEngine]) -> list[Pair]:
    """Return every prefill engine with every decode engine."""
    prefills = [engine for engine in engines if engine.role == "prefill"]
    decodes = [engine for engine in engines if engine.role == "decode"]
    return [_pair(prefill, decode) for prefill in prefills for decode in decodes]


def why_unserved(engines: Sequence[ListedEngine], pairs: Sequence[Pair]) -> str | None:
    """Return why no request can be served; None if one can."""
    mixed = any(engine.ready and engine.role == "mixed" for engine in engines)
    if mixed or any(pair.state in (PairState.READY, PairState.WAITING) for pair in pairs):
        return None
    if not engines:
        return "no engine has registered: start some with --router and the router's control port"
    missing = [role for role in ("prefill", "decode") if not any(e.ready and e.role == role for e in engines)]
    if missing == ["prefill"]:
        return None  # decode engines serve alone
    if missing:
        return f"no {' and no '.join(missing)} engine is ready, and no mixed one"
    return "every pair of a prefill and a decode engine is refused or lost"


def _pair(prefill: ListedEngine, decode: ListedEngine) -> Pair:
    for engine in (prefill, decode):
        if not engine.ready:
            advice = f"see the log of {engine.engine_id}; it comes back by itself once the router hears of it again"
            return Pair(prefill, decode, PairState.ABSENT, f"{engine.engine_id} is {engine.state}", advice)
    identity = (prefill.engine_id, prefill.incarnation)
    peer = next((peer for peer in decode.peers if (peer.engine_id, peer.incarnation) == identity), None)
    if peer is None or peer.state == "connecting":
        why = "the handshake is under way"
        if peer is None:
            why = f"{decode.engine_id} has not been introduced to this incarnation of {prefill.engine_id} yet"
        advice = f"ask again in some seconds; if it stays so, {decode.engine_id} cannot reach {prefill.peer_address}"
        return Pair(prefill, decode, PairState.WAITING, why, advice)
    if peer.state == "ready":
        return Pair(prefill, decode, PairState.READY)
    if peer.state == "refused":
        return Pair(prefill, decode, PairState.REFUSED, *_refused(prefill, decode, peer))
    error = peer.error or "no reason given"
    return Pair(prefill, decode, PairState.LOST, error, _lost_advice(prefill, decode, error))


def _refused(prefill: ListedEngine, decode: ListedEngine, peer: PeerInfo) -> tuple[str, str]:
    """Return what differs, with the engines' names, and what to do about it."""
    if peer.refusal is None:
        return peer.error or "no reason given", "compare how the two engines were started"
    field, ours, theirs = peer.refusal.field, _short(peer.refusal.ours), _short(peer.refusal.theirs)
    why = f"{field}: {decode.engine_id} has {ours}, {prefill.engine_id} has {theirs}"
    if field == "fingerprint" and prefill.model != decode.model:
        field = "model"
    return why, _REFUSED_ADVICE.get(field, _ANY_ADVICE).format(p=prefill, d=decode)


_ANY_ADVICE = "start both engines with the same settings and the same version"
_IDENTITY_ADVICE = (
    "another engine, or another incarnation of this one, answers at {p.peer_address}: ask again in some seconds; if it"
    " stays so, two engines use one address or one --engine-id"
)
_REFUSED_ADVICE = {
    "model": "they serve different models, {p.model} and {d.model}: start both with one model, or give each model a"
    " router of its own",
    "fingerprint": "both say {p.model}, but the weights or the config differ: give both the same folder, or the same"
    " hub name and revision; where each has a copy, make a new copy (the number of files counts too)",
    "kv_dtype": "start both with the same --dtype: {p.engine_id} has {p.dtype}, {d.engine_id} {d.dtype}",
    "connector": "start both with the same --connector (without one it is nixl where that is installed, else tcp)",
    "protocol": "their versions are too far apart ({p.engine_id}: {p.version}, {d.engine_id}: {d.version}): upgrade the"
    " older one",
    "layout": "the KV of {p.engine_id} (tp {p.tp}, pp {p.pp}) does not fill that of {d.engine_id} (tp {d.tp}, pp"
    " {d.pp}): if both serve the same model this is a fault of Tandem; report it with both shapes and the model's"
    " config.json",
    "engine_id": _IDENTITY_ADVICE,
    "incarnation": _IDENTITY_ADVICE,
}
"""By the field that differs; `p` is the prefill engine, `d` the decode engine."""


def _lost_advice(prefill: ListedEngine, decode: ListedEngine, error: str) -> str:
    address = prefill.peer_address
    if is_loopback(address.rpartition(":")[0].strip("[]")) and set(prefill.nodes) != set(decode.nodes):
        return (
            f"{prefill.engine_id} says that it is at {address}, which is loopback, and {decode.engine_id} is on another"
            " machine: start it with --host set to its address in the cluster, and with a --cluster-key-file"
        )
    if "nixl" in error.lower() or "read from" in error:
        return (
            "the handshake worked, the transport did not: set UCX_NET_DEVICES to the interface between the nodes on"
            " both (`tandem doctor --master ...` measures them), open all ports between them, or use --connector tcp"
        )
    return (
        f"from the node of {decode.engine_id}, {address} must be reachable: check the firewall (engines use any"
        " free port), that the cluster key is the same, and that the engine is alive; see both logs"
    )


def _short(value: str) -> str:
    """Return the beginning of a digest, and anything else unchanged."""
    return value[:SHORT] if re.fullmatch(r"[0-9a-f]{32,}", value) else value
