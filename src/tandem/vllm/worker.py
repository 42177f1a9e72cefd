"""The worker side: arena, transfer thread, and the copies that each step orders."""

from __future__ import annotations

import logging
import os
import re
import socket as hosts
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
from torch import Tensor

from tandem import __version__
from tandem.checkpoint.fingerprint import sketch
from tandem.errors import StartError, TransferError
from tandem.ids import new_identity
from tandem.kv.layout import Shard, Span
from tandem.transfer.handshake import PROTOCOL, RankDescriptor
from tandem.transfer.identity import RankRecord, agree
from tandem.transfer.transports.registry import connector_name, transport_factory
from tandem.vllm.arena import Arena
from tandem.vllm.messages import RankHandshake, StepOrders, StepReport
from tandem.vllm.options import ConnectorOptions
from tandem.vllm.pages import PageLayout
from tandem.vllm.rank_transfer import RankAgent, RankTransfer
from tandem.vllm.world import GroupWorld
from tandem.wire.keys import ClusterKey, load_key, new_key

log = logging.getLogger(__name__)

_LAYER_NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the connector knows of the model that vLLM serves.

    Attributes:
        path: its folder.
        dtype: of its KV, as Tandem names it.
        num_kv_heads: of the whole model.
        variant: what decides the KV beside the folder; empty for nothing.
    """

    path: str
    name: str
    dtype: str
    num_layers: int
    num_kv_heads: int
    block_size: int
    max_model_len: int
    variant: str = ""


class _Published(msgspec.Struct, frozen=True):
    descriptor: RankDescriptor
    engine_key: bytes | None


@dataclass(frozen=True, slots=True)
class StepResults:
    """Requests that vLLM hears of after a step: `received` has those in `failed` too."""

    received: set[str]
    failed: set[str]


class Worker:
    """One rank. Made when vLLM's groups are ready: the ranks agree on an identity here.

    Args:
        engine_id: of the engine; a new one is made if None.

    Raises:
        StartError: on all ranks alike, if they disagree.
    """

    def __init__(
        self, options: ConnectorOptions, model: ModelShape, world: GroupWorld, engine_id: str | None = None
    ) -> None:
        self._options = options
        self._model = model
        self._world = world
        self._key = load_key(options.access.cluster_key_file)
        self._connector = connector_name(options.connector)
        self.identity = agree(world, self._record(engine_id)).identity
        self._arena: Arena | None = None
        self._transfer: RankTransfer | None = None
        self._handshake: RankHandshake | None = None
        self._received: set[str] = set()
        self._failed: set[str] = set()

    def _record(self, engine_id: str | None) -> RankRecord:
        world, model = self._world, self._model
        return RankRecord(
            rank=world.rank,
            tp_rank=world.tp_rank,
            pp_rank=world.pp_rank,
            node_rank=0,
            host=hosts.gethostname(),
            pid=os.getpid(),
            engine_id=None,  # vLLM makes one for each process that was given none
            model=model.name,
            model_files=sketch(model.path),
            dtype=model.dtype,
            device="cpu",
            tp=world.tp_size,
            pp=world.pp_size,
            nnodes=1,
            block_size=model.block_size,
            max_model_len=model.max_model_len,
            connector=self._connector,
            protocol=PROTOCOL,
            version=__version__,
            cluster_key=self._key.fingerprint if self._key else "none",
            identity=new_identity(engine_id) if world.rank == 0 else None,
        )

    def register(self, caches: Mapping[str, Tensor], pages: PageLayout) -> None:
        """Take vLLM's caches by layer name, allocate the arena, and meet the other ranks. Raises StartError."""
        options, world = self._options, self._world
        names = sorted(caches, key=layer_number)
        shard = shard_of([layer_number(name) for name in names], self._model, world, heads=caches[names[0]].shape[1])
        arena = self._arena = Arena([caches[name] for name in names], shard, pages, options.arena_bytes)
        agent = RankAgent(
            world.rank, f"{self.identity.engine_id}/{self.identity.incarnation}/{world.rank}", options.host
        )
        transfer = self._transfer = RankTransfer(agent, transport_factory(self._connector, self._key), arena.region)
        own = RankDescriptor(
            world.rank, world.tp_rank, world.pp_rank, hosts.gethostname(), arena.layout, transfer.endpoint()
        )
        engine_key = (self._key or new_key()).secret if world.rank == 0 else None
        gathered = world.all_gather(msgspec.msgpack.encode(_Published(own, engine_key)))
        ranks = [msgspec.msgpack.decode(each, type=_Published) for each in gathered]
        key = ranks[0].engine_key
        if key is None:
            raise StartError("rank 0 published no key")
        address = transfer.listen([rank.descriptor.layout for rank in ranks], ClusterKey(key))
        self._handshake = RankHandshake(self.identity, own, address, key)
        log.info("rank %d: arena of %d blocks, %s pages", world.rank, arena.blocks, pages.name)

    @property
    def handshake(self) -> RankHandshake:
        """What the scheduler side needs of this rank, once it is registered."""
        if self._handshake is None:
            raise StartError("the KV caches are not registered yet")
        return self._handshake

    # --- each step -----------------------------------------------------------------------------------------------

    def load(self, orders: StepOrders) -> None:
        """Copy what has arrived into vLLM's blocks. Raises TransferError if the transfer thread has died."""
        if self._transfer is not None and self._transfer.failed is not None:
            raise TransferError(f"the transfer thread has ended: {self._transfer.failed}")
        for request_id, copy in orders.imports.items():
            self._ready_arena.load(copy.vllm_blocks, copy.arena_blocks)
            self._received.add(request_id)
        self._received.update(orders.failed, orders.dropped)
        self._failed.update(orders.failed)

    def save(self, orders: StepOrders) -> None:
        """Copy what the forward pass has computed into the arena."""
        for copy in orders.exports:
            self._ready_arena.export(copy.vllm_blocks, copy.arena_blocks)

    def take_results(self) -> StepResults:
        """Return what there is to tell vLLM since the last call."""
        results = StepResults(self._received, self._failed)
        self._received, self._failed = set(), set()
        return results

    @staticmethod
    def report(orders: StepOrders) -> StepReport:
        return StepReport(orders.step)

    @property
    def _ready_arena(self) -> Arena:
        if self._arena is None:
            raise StartError("the KV caches are not registered yet")
        return self._arena


def layer_number(name: str) -> int:
    """Return the number of a layer such as `model.layers.3.self_attn.attn`. Raises StartError."""
    numbers = _LAYER_NUMBER.findall(name)
    if len(numbers) != 1:
        raise StartError(f"layer {name!r} is not numbered as model.layers.3.self_attn.attn is; it is not supported")
    return int(numbers[0])


def shard_of(layers: Sequence[int], model: ModelShape, world: GroupWorld, heads: int) -> Shard:
    """Return what this rank holds: layers by their numbers, KV heads as vLLM spreads them. Raises StartError."""
    if list(layers) != list(range(layers[0], layers[0] + len(layers))):
        raise StartError(f"the layers of a rank must follow each other; this one has {list(layers)}")
    total, size = model.num_kv_heads, world.tp_size
    if heads != max(1, total // size) or (total % size and size % total):
        raise StartError(f"{total} KV heads over {size} ranks: vLLM gave this one {heads}; that is not supported")
    first = world.tp_rank * total // size
    return Shard(model.num_layers, total, Span(layers[0], layers[0] + len(layers)), Span(first, first + heads))
