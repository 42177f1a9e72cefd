"""Drain engines and change their roles, as a person asks a router to."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from tandem.api.backend import EngineState
from tandem.api.http_errors import NotFound, clipped
from tandem.errors import Unavailable
from tandem.router.engine_connections import EngineConnections
from tandem.router.engine_registry import EngineEntry
from tandem.wire.control_messages import ChangeRole, DrainEngine, EngineControl, Role

ANSWER_SECONDS = 5.0
"""For an engine to say that it does what it was told; its event loop answers at once, whatever its steps do."""


@dataclass(frozen=True, slots=True)
class EngineOperator:
    """Tells engines what to do, and waits until their heartbeats show it."""

    connections: EngineConnections

    async def drain(self, engine_id: str) -> EngineEntry:
        registry = self.connections.registry
        return await self._tell(
            engine_id,
            DrainEngine(),
            # One that has nothing to finish leaves before its next heartbeat.
            lambda engine: engine.status.draining or registry.get(engine.sender) is not engine,
        )

    async def change_role(self, engine_id: str, role: Role) -> EngineEntry:
        return await self._tell(engine_id, ChangeRole(role), lambda engine: engine.role == role)

    async def _tell(
        self, engine_id: str, message: EngineControl, is_done: Callable[[EngineEntry], bool]
    ) -> EngineEntry:
        engine = self._find(engine_id)
        self.connections.send(engine.sender, message)
        deadline = time.monotonic() + ANSWER_SECONDS
        while not is_done(engine):
            left = deadline - time.monotonic()
            if engine.state is EngineState.LOST or self.connections.registry.get(engine.sender) is not engine:
                raise Unavailable(f"{engine_id} was lost before it answered; see /tandem/engines")
            if left <= 0:
                raise Unavailable(f"{engine_id} has not answered within {ANSWER_SECONDS:g} s; see /tandem/engines")
            await self.connections.changed(left)
        return engine

    def _find(self, engine_id: str) -> EngineEntry:
        engines = list(self.connections.registry)
        for engine in engines:
            if engine.engine_id == engine_id:
                if engine.state is EngineState.LOST:
                    raise Unavailable(f"{engine_id} is lost: {engine.reason}")
                return engine
        known = ", ".join(engine.engine_id for engine in engines) or "none"
        raise NotFound(f"there is no engine {clipped(engine_id)!r} here; there is {clipped(known, 500)}")
