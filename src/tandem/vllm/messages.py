"""Messages between the scheduler side of the connector and its workers; vLLM carries them with each step, pickled.

Plain data, so that neither side needs vLLM to be tested.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem.ids import EngineIdentity
from tandem.transfer.handshake import RankDescriptor
from tandem.wire.messages import Address


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy whole blocks between vLLM's cache and the arena; both lists are of one length."""

    vllm_blocks: list[int]
    arena_blocks: list[int]


@dataclass(frozen=True, slots=True)
class StepOrders:
    """What the workers do in one step.

    Attributes:
        step: counts the steps; comes back in `StepReport`.
        exports: into the arena, once the forward pass has filled vLLM's blocks.
        imports: from the arena, by request.
        failed: requests whose KV does not come.
        dropped: requests that have ended while their KV was on its way; vLLM may have their blocks back.
    """

    step: int
    exports: list[Copy] = field(default_factory=list)
    imports: dict[str, Copy] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class StepReport:
    """A worker has done all that a step's orders asked, and those of the steps before it."""

    step: int

    def aggregate(self, other: StepReport) -> StepReport:
        """Return what all of both workers have done."""
        return StepReport(min(self.step, other.step))


@dataclass(frozen=True, slots=True)
class RankHandshake:
    """What the scheduler side learns of a worker before the first step.

    Attributes:
        transfer: where its transfer thread listens for the leader.
        engine_key: secret of this life of the engine, for that connection.
    """

    identity: EngineIdentity
    descriptor: RankDescriptor
    transfer: Address
    engine_key: bytes = field(repr=False)
