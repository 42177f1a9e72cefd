"""The placement of one rank of an engine."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.model_folder import ModelFolder
from tandem.wire.keys import ClusterKey
from tandem.wire.messages import Address


@dataclass(frozen=True, slots=True)
class RankPlacement:
    """A rank's place among nodes, devices and frontends, as its launcher decides it.

    Attributes:
        local_rank: number among the ranks of this node; picks the GPU.
        host: this node's address, under which the other nodes, engines and the router reach it.
        meeting: where the ranks find each other: --master, or a file on a single node; None if there is one rank.
        frontends: where to register: at the router, and at the API of the engine itself.
        http_address: where that API listens.
        model: its folder on this node.
        key: the cluster key, if there is one.
    """

    rank: int
    local_rank: int
    host: str
    meeting: Address | str | None
    frontends: tuple[Address, ...]
    http_address: Address | None
    model: ModelFolder
    key: ClusterKey | None = None
