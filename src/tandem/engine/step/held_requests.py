"""Requests that wait for their grammar to be compiled, before the scheduler knows of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from tandem.engine.step_commands import AbortRequest, Command, GrammarReady, KvFailed, ReadsEnded, StartRequest


@dataclass(slots=True)
class _Held:
    start: StartRequest
    since: float
    later: list[Command] = field(default_factory=list)


class HeldRequests:
    """What comes for a held request waits with it, in order; an abort ends both."""

    def __init__(self) -> None:
        self._held: dict[str, _Held] = {}

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._held

    def hold(self, start: StartRequest, now: float) -> None:
        self._held[start.generate.request_id] = _Held(start, now)

    def takes(self, command: Command) -> bool:
        """Return whether a command was for a held request, and has been seen to."""
        match command:
            case AbortRequest(request_id=request_id):
                return self._held.pop(request_id, None) is not None
            case KvFailed(request_id=request_id) | ReadsEnded(request_id=request_id) if request_id in self._held:
                self._held[request_id].later.append(command)
                return True
        return False

    def release(self, ready: GrammarReady, now: float) -> tuple[StartRequest, list[Command]] | None:
        """Return the request with less time left, and what came for it; None if it is not held any more."""
        held = self._held.get(ready.request_id)
        if held is None or held.since != ready.since:
            return None
        del self._held[ready.request_id]
        generate = held.start.generate
        time_left = max(0.0, generate.time_left - (now - held.since))
        return StartRequest(held.start.frontend, msgspec.structs.replace(generate, time_left=time_left)), held.later
