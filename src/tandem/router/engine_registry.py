"""The engines that a frontend knows, and whether they are there. Pure; time is passed in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from tandem.api.backend import EngineState
from tandem.wire.engine_status import EngineStatus, PeerInfo
from tandem.wire.messages import Register

MAX_ENGINES = 1024
ALIVE_SECONDS = 1.5
"""Several heartbeats: an engine that was heard within this time is alive."""
MIN_STALL_SECONDS = 3.0
STALL_SHARE = 0.25
"""An engine is not used while a step of it has run for this share of its --step-timeout, MIN_STALL_SECONDS at least."""


@dataclass(slots=True)
class EngineEntry:
    """One incarnation of one engine.

    Attributes:
        sender: the identity of its socket, to which messages for it are sent.
        status: its last heartbeat.
        state: whether it may be used; if not, `reason` says why.
        registered: its connection has not broken since it registered.
        active: requests of ours that it works on now.
        prompt_tokens: that it has to compute for them, as far as we know.
        last_chosen: number of the last request that it was chosen for; breaks ties.
        peers: its sessions by engine id and incarnation of the other engine.
    """

    sender: bytes
    register: Register
    status: EngineStatus
    last_heard: float
    state: EngineState = EngineState.READY
    reason: str | None = None
    registered: bool = True
    active: int = 0
    prompt_tokens: int = 0
    last_chosen: int = 0
    peers: dict[tuple[str, str], PeerInfo] = field(default_factory=dict)

    def drains(self) -> None:
        """It takes no new requests and is about to end."""
        self.state, self.reason = EngineState.DRAINING, "it was told to stop"

    @property
    def engine_id(self) -> str:
        return self.register.identity.engine_id

    @property
    def incarnation(self) -> str:
        return self.register.identity.incarnation

    @property
    def role(self) -> str:
        return self.status.role


class EngineRegistry:
    """Engines by the identity of their sockets; at most one incarnation of an engine id is there at a time.

    Args:
        patience: seconds of silence after which an engine counts as lost.
        memory: seconds for which a lost engine is still shown.
    """

    def __init__(self, patience: float = 5.0, memory: float = 60.0) -> None:
        self._patience = patience
        self._memory = memory
        self._engines: dict[bytes, EngineEntry] = {}

    def __iter__(self) -> Iterator[EngineEntry]:
        return iter(list(self._engines.values()))

    def get(self, sender: bytes) -> EngineEntry | None:
        return self._engines.get(sender)

    def living_namesake(self, message: Register, now: float) -> EngineEntry | None:
        """Return another incarnation of the engine that is alive, so that this one must be a second engine."""
        for engine in self.present():
            same_id = engine.engine_id == message.identity.engine_id
            if same_id and engine.incarnation != message.identity.incarnation:
                return engine if now - engine.last_heard < ALIVE_SECONDS else None
        return None

    def is_full(self, message: Register) -> bool:
        """Return whether there is no room for an engine: MAX_ENGINES others are known."""
        others = [engine for engine in self if engine.engine_id != message.identity.engine_id]
        return len(others) >= MAX_ENGINES

    def register(self, sender: bytes, message: Register, now: float) -> list[EngineEntry]:
        """Add an engine. Return earlier incarnations of it, which are over now."""
        known = self._engines.get(sender)
        if known is not None and known.incarnation == message.identity.incarnation:
            known.register, known.registered = message, True
            self.heartbeat(sender, message.status, now)
            return []
        replaced = [engine for engine in self if engine.engine_id == message.identity.engine_id]
        for engine in replaced:
            del self._engines[engine.sender]
        self._engines[sender] = EngineEntry(sender, message, message.status, now)
        self.heartbeat(sender, message.status, now)
        return replaced

    def heartbeat(self, sender: bytes, status: EngineStatus, now: float) -> EngineEntry | None:
        """Note an engine's status. Return None if the engine must register first."""
        engine = self._engines.get(sender)
        if engine is None or engine.incarnation != status.incarnation or not engine.registered:
            return None
        engine.status, engine.last_heard = status, now
        engine.state, engine.reason = EngineState.READY, None
        if status.draining:
            engine.drains()
        if (reason := stall(engine)) is not None:
            engine.state, engine.reason = EngineState.STALLED, reason
        engine.peers = {(peer.engine_id, peer.incarnation): peer for peer in status.peers}
        return engine

    def disconnect(self, sender: bytes) -> EngineEntry | None:
        """Count an engine as lost, as its connection broke, until it registers again. Return it if it was there."""
        engine = self._engines.get(sender)
        if engine is None or not engine.registered:
            return None
        engine.registered = False
        engine.state, engine.reason = EngineState.LOST, "its connection broke"
        return engine

    def leave(self, sender: bytes) -> EngineEntry | None:
        """Remove an engine. Return it if it was known."""
        return self._engines.pop(sender, None)

    def discount(self, seconds: float) -> None:
        """Do not count `seconds` as silence of the engines: this process slept for as long."""
        for engine in self:
            engine.last_heard += seconds

    def expire(self, now: float) -> list[EngineEntry]:
        """Return engines that have been silent for too long since the last call."""
        lost = []
        for engine in self:
            silence = now - engine.last_heard
            if engine.state is not EngineState.LOST and silence > self._patience:
                engine.state, engine.reason = EngineState.LOST, f"it was not heard of for {self._patience:g} s"
                lost.append(engine)
            elif silence > self._memory:
                del self._engines[engine.sender]
        return lost

    def served(self) -> EngineEntry | None:
        """Return the engine that came first and is there: its model is the one that this frontend serves."""
        return next(iter(self.ready()), next(iter(self), None))

    def present(self, role: str | None = None) -> list[EngineEntry]:
        """Return the engines that are there, whether requests may go to them or not."""
        return [engine for engine in self if engine.state is not EngineState.LOST and role in (None, engine.role)]

    def is_ready(self, incarnation: str) -> bool:
        """Return whether requests may go to this incarnation of an engine."""
        return any(engine.incarnation == incarnation for engine in self.ready())

    def ready(self, role: str | None = None) -> list[EngineEntry]:
        return [engine for engine in self if engine.state is EngineState.READY and role in (None, engine.role)]


def stall(engine: EngineEntry) -> str | None:
    """Return why an engine is taken to hang, if it is; it ends itself when its --step-timeout has passed."""
    limit = max(MIN_STALL_SECONDS, STALL_SHARE * engine.register.step_timeout)
    seconds = engine.status.step_seconds
    return f"a step of it has run for {seconds:.1f} s, longer than {limit:g} s" if seconds > limit else None
