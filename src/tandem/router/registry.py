"""What a frontend knows of its engines. Pure; time is passed in."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field

from tandem.wire.messages import EngineStatus, PeerInfo, Register

RIVAL_SECONDS = 1.5
"""Several heartbeats: an engine that was heard within this time is alive."""


class EngineState(enum.Enum):
    READY = "ready"
    LOST = "lost"
    LEAVING = "leaving"


@dataclass(slots=True)
class EngineEntry:
    """One life of one engine.

    Attributes:
        route: where the hub sends messages for it.
        active: requests of ours that it works on now.
        chosen: number of the last request that it was chosen for; breaks ties.
    """

    route: bytes
    register: Register
    status: EngineStatus
    last_heard: float
    state: EngineState = EngineState.READY
    active: int = 0
    chosen: int = 0
    peers: dict[tuple[str, str], PeerInfo] = field(default_factory=dict)

    @property
    def engine_id(self) -> str:
        return self.register.identity.engine_id

    @property
    def incarnation(self) -> str:
        return self.register.identity.incarnation

    @property
    def role(self) -> str:
        return self.register.status.role


class EngineRegistry:
    """Engines by route; at most one life of an engine id is there at a time.

    Args:
        patience: seconds of silence after which an engine counts as lost.
        memory: seconds for which a lost engine is still shown.
    """

    def __init__(self, patience: float = 5.0, memory: float = 60.0) -> None:
        self._patience = patience
        self._memory = memory
        self._members: dict[bytes, EngineEntry] = {}

    def __iter__(self) -> Iterator[EngineEntry]:
        return iter(list(self._members.values()))

    def get(self, route: bytes) -> EngineEntry | None:
        return self._members.get(route)

    def find(self, engine_id: str, incarnation: str | None = None) -> EngineEntry | None:
        for member in self._members.values():
            if member.engine_id == engine_id and incarnation in (None, member.incarnation):
                return member
        return None

    def rival(self, message: Register, now: float) -> EngineEntry | None:
        """Another life of the same engine that was heard of a moment ago, so that this one must be a second engine."""
        for member in self:
            same = member.engine_id == message.identity.engine_id and member.incarnation != message.identity.incarnation
            if same and member.state is EngineState.READY and now - member.last_heard < RIVAL_SECONDS:
                return member
        return None

    def register(self, route: bytes, message: Register, now: float) -> list[EngineEntry]:
        """Add an engine. Returns earlier lives of it, which are over now."""
        known = self._members.get(route)
        if known is not None and known.incarnation == message.identity.incarnation:
            known.register, known.last_heard, known.state = message, now, EngineState.READY
            return []
        replaced = [m for m in self if m.engine_id == message.identity.engine_id]
        for member in replaced:
            member.state = EngineState.LOST
            del self._members[member.route]
        self._members[route] = EngineEntry(route, message, message.status, now)
        return replaced

    def heard(self, route: bytes, status: EngineStatus, now: float) -> EngineEntry | None:
        """A heartbeat; None if the engine must register first."""
        member = self._members.get(route)
        if member is None or member.incarnation != status.incarnation:
            return None
        member.status, member.last_heard = status, now
        member.peers = {(p.engine_id, p.incarnation): p for p in status.peers}
        if member.state is EngineState.LOST:
            member.state = EngineState.READY
        return member

    def leave(self, route: bytes) -> EngineEntry | None:
        member = self._members.pop(route, None)
        if member is not None:
            member.state = EngineState.LEAVING
        return member

    def pardon(self, seconds: float) -> None:
        """This process slept for so long: that was not the engines' silence."""
        for member in self:
            member.last_heard += seconds

    def expire(self, now: float) -> list[EngineEntry]:
        """Engines that have been silent for too long since the last call."""
        lost = []
        for member in self:
            silence = now - member.last_heard
            if member.state is EngineState.READY and silence > self._patience:
                member.state = EngineState.LOST
                lost.append(member)
            elif silence > self._memory:
                del self._members[member.route]
        return lost

    def served(self) -> EngineEntry | None:
        """The engine that came first and is there: what it serves is what this frontend serves."""
        return next((m for m in self if m.state is EngineState.READY), next(iter(self), None))

    def ready(self, *roles: str) -> list[EngineEntry]:
        return [m for m in self if m.state is EngineState.READY and m.role in roles]
