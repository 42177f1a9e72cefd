"""Where one rank of an engine runs, as its launcher decides it."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.model_folder import ModelFolder
from tandem.wire.messages import Address


@dataclass(frozen=True, slots=True)
class RankPlace:
    """
    Attributes:
        local_rank: number among the ranks of this node; picks the GPU.
        host: this node's address under which the other nodes, engines and the router reach it.
        meeting_file: where the ranks of a single-node engine meet; None with a master.
        frontends: sockets to register with: the router's, and that of the engine's own API.
    """

    rank: int
    local_rank: int
    host: str
    meeting_file: str | None
    frontends: tuple[Address, ...]
    http_address: Address | None
    model: ModelFolder
