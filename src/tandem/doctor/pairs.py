"""Which prefill engine works with which decode engine, and what to do about those that do not. Pure."""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tandem.doctor.engines import EngineView, PeerView
from tandem.wire.addresses import is_loopback

SHORT = 12
_DIFFERS = re.compile(r"(\w+) differs: ours is (.*), theirs is (.*)", re.DOTALL)


class PairState(enum.Enum):
    """READY: KV can move. WAITING: not yet. The others are of no use."""

    READY = "ready"
    WAITING = "connecting"
    REFUSED = "refused"
    LOST = "lost"
    ABSENT = "engine absent"


@dataclass(frozen=True, slots=True)
class Pair:
    """`why`: what the engines say; `advice`: what a person can do. Both None where all is well."""

    prefill: EngineView
    decode: EngineView
    state: PairState
    why: str | None = None
    advice: str | None = None

    @property
    def usable(self) -> bool:
        return self.state in (PairState.READY, PairState.WAITING)


def pairs(engines: Sequence[EngineView]) -> list[Pair]:
    """Every prefill engine with every decode engine."""
    prefills = [engine for engine in engines if engine.role == "prefill"]
    decodes = [engine for engine in engines if engine.role == "decode"]
    return [_pair(prefill, decode) for prefill in prefills for decode in decodes]


def no_path(engines: Sequence[EngineView], found: Sequence[Pair]) -> str | None:
    """Why no request can be served; None if one can."""
    if any(engine.ready and engine.role == "mixed" for engine in engines) or any(pair.usable for pair in found):
        return None
    if not engines:
        return "no engine has registered: start some with --router and the router's control port"
    missing = [role for role in ("prefill", "decode") if not any(e.ready and e.role == role for e in engines)]
    if missing:
        return f"no {' and no '.join(missing)} engine is ready, and no mixed one"
    return "every pair of a prefill and a decode engine is refused or lost"


def _pair(prefill: EngineView, decode: EngineView) -> Pair:
    for engine in (prefill, decode):
        if not engine.ready:
            advice = f"see the log of {engine.engine_id}; it comes back by itself once the router hears of it again"
            return Pair(prefill, decode, PairState.ABSENT, f"{engine.engine_id} is {engine.state}", advice)
    peer = _session(prefill, decode)
    if peer is None or peer.state == "connecting":
        return _waiting(prefill, decode, peer)
    if peer.state == "ready":
        return Pair(prefill, decode, PairState.READY)
    if peer.state == "refused":
        return Pair(prefill, decode, PairState.REFUSED, *_refused(prefill, decode, peer.error or "no reason given"))
    return Pair(prefill, decode, PairState.LOST, *_lost(prefill, decode, peer.error or "no reason given"))


def _session(prefill: EngineView, decode: EngineView) -> PeerView | None:
    for peer in decode.peers:
        if (peer.engine_id, peer.incarnation) == (prefill.engine_id, prefill.incarnation):
            return peer
    return None


def _waiting(prefill: EngineView, decode: EngineView, peer: PeerView | None) -> Pair:
    if peer is None:
        why = f"{decode.engine_id} has not been introduced to this life of {prefill.engine_id} yet"
    else:
        why = "the handshake is under way"
    advice = f"ask again in some seconds; if it stays so, {decode.engine_id} cannot reach {prefill.peer_address}"
    return Pair(prefill, decode, PairState.WAITING, why, advice)


def _refused(prefill: EngineView, decode: EngineView, error: str) -> tuple[str, str]:
    """What differs, with the engines' names, and what to do about it."""
    match = _DIFFERS.search(error)
    if match is None:
        return error, "compare how the two engines were started"
    field, ours, theirs = match[1], match[2], match[3]
    why = f"{field}: {decode.engine_id} has {_short(ours)}, {prefill.engine_id} has {_short(theirs)}"
    return why, _REMEDIES.get(field, _other)(prefill, decode)


def _fingerprint(prefill: EngineView, decode: EngineView) -> str:
    if prefill.model != decode.model:
        return (
            f"they serve different models, {prefill.model} and {decode.model}: start both with one model, or give each"
            " model a router of its own"
        )
    return (
        f"both say {prefill.model}, but the weights or the config differ: give both the same folder, or the same hub"
        " name and revision; where each has a copy, copy it anew (the number of files counts too)"
    )


def _kv_dtype(prefill: EngineView, decode: EngineView) -> str:
    return (
        f"start both with the same --dtype: {prefill.engine_id} has {prefill.dtype}, {decode.engine_id} {decode.dtype}"
    )


def _connector(prefill: EngineView, decode: EngineView) -> str:
    return "start both with the same --connector (without one it is nixl where that is installed, else tcp)"


def _protocol(prefill: EngineView, decode: EngineView) -> str:
    return (
        f"their versions are too far apart ({prefill.engine_id}: {prefill.version}, {decode.engine_id}:"
        f" {decode.version}): upgrade the older one"
    )


def _layout(prefill: EngineView, decode: EngineView) -> str:
    return (
        f"the KV of {_shape(prefill)} does not fill that of {_shape(decode)}: if both serve the same model this is a"
        " fault of Tandem; report it with both shapes and the model's config.json"
    )


def _identity(prefill: EngineView, decode: EngineView) -> str:
    return (
        f"another engine, or another life of this one, answers at {prefill.peer_address}: ask again in some seconds; if"
        " it stays so, two engines use one address or one --engine-id"
    )


def _other(prefill: EngineView, decode: EngineView) -> str:
    return "start both engines with the same settings and the same version"


_REMEDIES = {
    "fingerprint": _fingerprint,
    "kv_dtype": _kv_dtype,
    "connector": _connector,
    "protocol": _protocol,
    "layout": _layout,
    "engine_id": _identity,
    "incarnation": _identity,
}


def _lost(prefill: EngineView, decode: EngineView, error: str) -> tuple[str, str]:
    address = prefill.peer_address
    if is_loopback(address.rpartition(":")[0].strip("[]")) and set(prefill.nodes) != set(decode.nodes):
        advice = (
            f"{prefill.engine_id} says that it is at {address}, which is loopback, and {decode.engine_id} is on another"
            " machine: start it with --host set to its address in the cluster, and with a --cluster-key-file"
        )
    elif "nixl" in error.lower() or "read from" in error:
        advice = (
            "the handshake worked, the transport did not: set UCX_NET_DEVICES to the interface between the nodes on"
            " both (`tandem doctor --master ...` measures them), open all ports between them, or use --connector tcp"
        )
    else:
        advice = (
            f"from the node of {decode.engine_id}, {address} must be reachable: check the firewall (engines use any"
            " free port), that the cluster key is the same, and that the engine is alive; see both logs"
        )
    return error, advice


def _shape(engine: EngineView) -> str:
    return f"{engine.engine_id} (tp {engine.tp}, pp {engine.pp})"


def _short(value: str) -> str:
    """Digests by their beginning."""
    return value[:SHORT] if re.fullmatch(r"[0-9a-f]{32,}", value) else value
