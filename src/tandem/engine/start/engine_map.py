"""The exchange after which every rank knows the memory of all ranks, their weights, and where the leader listens."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from tandem.engine.io.leader_sockets import LeaderAddresses
from tandem.errors import StartError
from tandem.transfer.handshake import RankDescriptor
from tandem.transfer.identity import World


@dataclass(frozen=True, slots=True)
class EngineMap:
    """All ranks of this engine, by rank, where rank 0 listens for them, and the fingerprint of their model."""

    ranks: list[RankDescriptor]
    leader: LeaderAddresses
    fingerprint: str


class _Published(msgspec.Struct, frozen=True):
    descriptor: RankDescriptor
    leader: LeaderAddresses | None
    fingerprint: str | None


def exchange(world: World, own: RankDescriptor, leader: LeaderAddresses | None, fingerprint: str | None) -> EngineMap:
    """Gather the descriptors of all ranks, over the world group.

    Args:
        leader: on rank 0 alone.
        fingerprint: of the model; on one rank of each node at least, rank 0 among them.

    Raises:
        StartError: on all ranks alike, if the nodes have different models.
    """
    gathered = world.all_gather(msgspec.msgpack.encode(_Published(own, leader, fingerprint)))
    published = [msgspec.msgpack.decode(data, type=_Published) for data in gathered]
    addresses = published[0].leader
    if addresses is None:
        raise StartError("rank 0 did not publish where it listens")
    return EngineMap([each.descriptor for each in published], addresses, _agreed_fingerprint(published))


def _agreed_fingerprint(published: list[_Published]) -> str:
    first = published[0]
    if first.fingerprint is None:
        raise StartError("rank 0 did not publish a fingerprint")
    for other in published:
        if other.fingerprint not in (None, first.fingerprint):
            raise StartError(
                f"the nodes of this engine disagree on fingerprint: {first.descriptor.node} has {first.fingerprint},"
                f" {other.descriptor.node} has {other.fingerprint}; the files of the model differ though their sizes"
                " do not: copy them anew"
            )
    return first.fingerprint
