"""After the last exchange of a start all ranks know the same engine, or have the same error."""

from __future__ import annotations

import msgspec
import pytest

from tandem.engine.io.leader_sockets import LeaderAddresses
from tandem.engine.start.engine_map import exchange
from tandem.errors import StartError
from tandem.ids import EngineIdentity
from tandem.transfer.handshake import RankDescriptor
from tandem.wire.messages import Address
from tests.transfer.engines import descriptor

LEADER = LeaderAddresses(Address("127.0.0.1", 1), Address("127.0.0.1", 2), Address("127.0.0.1", 3))
RANKS = [
    msgspec.structs.replace(rank, node=f"host{rank.rank // 2}")
    for rank in descriptor(EngineIdentity("p0", "life"), tp=2, pp=2).ranks
]


class Gathering:
    """Two passes: the first takes what each rank sends, the second gives it to all."""

    size = len(RANKS)

    def __init__(self) -> None:
        self.rank = 0
        self.sent: list[bytes] = []
        self.complete = False

    def all_gather(self, data: bytes) -> list[bytes]:
        if not self.complete:
            self.sent.append(data)
        return self.sent


def outcomes(fingerprints: list[str | None]) -> list[str]:
    world = Gathering()

    def outcome(own: RankDescriptor) -> str:
        try:
            return exchange(world, own, LEADER if own.rank == 0 else None, fingerprints[own.rank]).fingerprint
        except StartError as error:
            return str(error)

    for own in RANKS:
        outcome(own)
    world.complete = True
    return [outcome(own) for own in RANKS]


def test_ranks_that_read_no_weights_take_the_fingerprint_of_those_that_did() -> None:
    assert outcomes(["f", None, "f", None]) == ["f"] * 4


def test_nodes_whose_weights_differ_are_one_error_on_all_ranks_that_names_them() -> None:
    [found] = set(outcomes(["f", None, "g", None]))
    assert "host0 has f, host1 has g" in found


@pytest.mark.parametrize("fingerprints", [[None, None, "f", None], [None] * 4])
def test_a_leader_without_a_fingerprint_is_an_error(fingerprints: list[str | None]) -> None:
    assert len(set(outcomes(fingerprints))) == 1
    assert "rank 0 did not publish" in outcomes(fingerprints)[0]
