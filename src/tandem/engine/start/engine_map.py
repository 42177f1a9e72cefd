"""The exchange after which every rank knows the memory of all ranks and where the leader listens."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from tandem.engine.io.leader_sockets import LeaderAddresses
from tandem.engine.world import SoloWorld, TorchWorld
from tandem.errors import StartError
from tandem.transfer.handshake import RankDescriptor


@dataclass(frozen=True, slots=True)
class EngineMap:
    """All ranks of this engine, by rank, and where rank 0 listens for them."""

    ranks: list[RankDescriptor]
    leader: LeaderAddresses


class _Published(msgspec.Struct, frozen=True):
    descriptor: RankDescriptor
    leader: LeaderAddresses | None


def exchange(world: SoloWorld | TorchWorld, own: RankDescriptor, leader: LeaderAddresses | None) -> EngineMap:
    """Gather the descriptors of all ranks, over the world group. `leader`: on rank 0 alone."""
    gathered = world.all_gather(msgspec.msgpack.encode(_Published(own, leader)))
    published = [msgspec.msgpack.decode(data, type=_Published) for data in gathered]
    addresses = published[0].leader
    if addresses is None:
        raise StartError("rank 0 did not publish where it listens")
    return EngineMap([each.descriptor for each in published], addresses)
