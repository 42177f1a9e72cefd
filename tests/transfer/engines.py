"""Engines as peers see them: descriptors, without processes or transports behind them."""

from __future__ import annotations

from tandem.ids import EngineIdentity
from tandem.kv.layout import block_major
from tandem.kv.shard import shard
from tandem.transfer.handshake import EngineDescriptor, RankDescriptor
from tandem.transfer.transports.base import RankEndpoint, Region
from tandem.wire.peer_messages import Envelope

ENVELOPE = Envelope((1, 2), "fingerprint", "float32", "tcp", "tandem 1.0")
BLOCK_SIZE = 4


def descriptor(identity: EngineIdentity, tp: int = 1, pp: int = 1, block_size: int = BLOCK_SIZE) -> EngineDescriptor:
    """4 layers and 4 KV heads, spread over the ranks; 8 blocks."""
    ranks = []
    for rank in range(tp * pp):
        held = shard(4, 4, tp=tp, pp=pp, tp_rank=rank % tp, pp_rank=rank // tp)
        layout = block_major(held, blocks=8, block_size=block_size, head_dim=2, itemsize=4)
        agent = f"{identity.engine_id}/{identity.incarnation}/{rank}"
        endpoint = RankEndpoint(agent, b"metadata", Region(0, layout.nbytes))
        ranks.append(RankDescriptor(rank, rank % tp, rank // tp, "node", layout, endpoint))
    return EngineDescriptor(identity, block_size, ranks)
