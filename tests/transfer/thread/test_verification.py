"""A bit that flips in a source's memory, in its table or on the way is found and its place named; nothing else is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.kv.checksums import checksum_layout, checksum_offset
from tandem.kv.layout import Axis, KvLayout, block_major, latent
from tandem.kv.shard import shard
from tandem.models.kv_checksums import KvChecksums
from tandem.transfer.handshake import RankDescriptor
from tandem.transfer.thread.thread_messages import OpenPeer, PeerOpened, ReadEnded, ReadOrder
from tandem.transfer.thread.verification import PIECE_BYTES
from tandem.transfer.transports.base import RankEndpoint, Region
from tests.transfer.thread.test_transfer_thread import BLOCKS, SHAPES, FakeTransport, Rig, fill, layouts, view, world


@dataclass
class Memory:
    """One rank's KV with its checksums behind it."""

    layout: KvLayout
    bytes: np.ndarray
    checksums: KvChecksums

    @classmethod
    def of(cls, layout: KvLayout, dtype: torch.dtype = torch.float32) -> Memory:
        offset = checksum_offset(layout)
        memory = np.zeros(offset + checksum_layout(layout).nbytes, np.uint8)
        kv = torch.from_numpy(memory[: layout.nbytes]).view(dtype).view(layout.shape)
        table = torch.from_numpy(memory[offset:]).view(torch.int64)
        return cls(layout, memory, KvChecksums(kv, layout, table, offset))

    def compute(self, blocks: Sequence[int], kv: np.ndarray, cuts: Sequence[int]) -> None:
        """As an engine does, chunk by chunk and layer by layer. `kv`: [token, layer, kv, head, dim]."""
        self.bytes[: self.layout.nbytes] = fill(self.layout, blocks, kv)
        size, layers, heads = self.layout.block_size, self.layout.layers, self.layout.heads
        for start, stop in pairwise(cuts):
            positions = torch.arange(start, stop)
            slots = self.checksums.slots(torch.tensor(blocks)[positions // size], positions % size, positions)
            for layer in layers.indices:
                new = kv[start:stop, layer][:, :, heads.start : heads.stop].reshape(stop - start, -1, kv.shape[-1])
                self.checksums.write(slots, layer - layers.start, torch.from_numpy(np.ascontiguousarray(new)))

    def table(self) -> np.ndarray:
        described = checksum_layout(self.layout)
        shape = [described.size(axis) for axis in (Axis.BLOCK, Axis.HEAD, Axis.LAYER, Axis.TOKEN)]
        found: np.ndarray = self.bytes[self.checksums.offset :].view(np.uint64).reshape(shape)
        return found


def descriptors(of: Sequence[Memory]) -> list[RankDescriptor]:
    return [
        RankDescriptor(
            rank, 0, 0, "node", memory.layout, RankEndpoint(f"p/{rank}", b"", Region(0, len(memory.bytes))),
            memory.checksums.offset,
        )
        for rank, memory in enumerate(of)
    ]  # fmt: skip


@dataclass
class Flipping(FakeTransport):
    """`flip` is called when the bytes have come."""

    flip: Callable[[], None] = field(default=lambda: None)

    def poll(self) -> None:
        came = bool(self.waiting)
        super().poll()
        if came:
            self.flip()


@dataclass(frozen=True)
class Place:
    token: int
    layer: int
    head: int
    kind: int
    byte: int
    bit: int

    def flip(self, memory: Memory, blocks: Sequence[int]) -> None:
        layout = memory.layout
        if self.layer in layout.layers.indices and self.head in layout.heads.indices:
            block, slot = blocks[self.token // layout.block_size], self.token % layout.block_size
            layer, head = self.layer - layout.layers.start, self.head - layout.heads.start
            row = view(memory.bytes, layout)[block, layer, self.kind, head, slot].view(np.uint8)
            row[self.byte] ^= 1 << self.bit

    def flip_checksum(self, memory: Memory, blocks: Sequence[int]) -> None:
        layout = memory.layout
        if self.layer in layout.layers.indices and self.head in layout.heads.indices:
            block, slot = blocks[self.token // layout.block_size], self.token % layout.block_size
            layer, head = self.layer - layout.layers.start, self.head - layout.heads.start
            memory.table()[block, head, layer, slot] ^= np.uint64(1 << (8 * self.byte + self.bit))


def places(total: int, here: KvLayout) -> st.SearchStrategy[Place]:
    return st.builds(
        Place,
        st.integers(0, total - 1),
        st.sampled_from(here.layers.indices),
        st.sampled_from(here.heads.indices),
        st.integers(0, 1),
        st.integers(0, 7),
        st.integers(0, 7),
    )


@given(SHAPES, SHAPES, st.data())
@settings(max_examples=60, deadline=None)
def test_any_one_bit_is_found_for_any_two_shapes_and_its_place_is_named(
    source: Any, destination: Any, data: st.DataObject
) -> None:
    there, here = [Memory.of(la) for la in layouts(*source)], [Memory.of(la) for la in layouts(*destination)]
    total = data.draw(st.integers(1, BLOCKS * min(there[0].layout.block_size, here[0].layout.block_size)))
    cuts = sorted(data.draw(st.sets(st.integers(1, total), max_size=2)) | {0, total})
    src, dst = (list(data.draw(st.permutations(range(BLOCKS)))) for _ in range(2))
    rank = data.draw(st.integers(0, len(here) - 1))
    own, kv = here[rank], world(total)
    for memory in there:
        memory.compute(src, kv, cuts)
    where = data.draw(st.sampled_from(["nowhere", "memory", "table", "flight"]))
    place = data.draw(places(total, own.layout))
    for memory in there:
        if where == "memory":
            place.flip(memory, src)
        elif where == "table":
            place.flip_checksum(memory, src)
    transport = Flipping({f"p/{n}": memory.bytes for n, memory in enumerate(there)}, own.bytes)
    it = Rig(transport, [memory.layout for memory in here], rank, own.checksums)
    try:
        it.tell(OpenPeer(1, descriptors(there)))
        assert it.heard() == [PeerOpened(rank, 1)]
        for job, (start, stop) in enumerate(pairwise(cuts)):
            hit = where != "nowhere" and start <= place.token < stop
            transport.flip = (lambda: place.flip(own, dst)) if hit and where == "flight" else lambda: None
            it.tell(ReadOrder(job, 1, "r", src, dst, start, stop, stop == total))
            [ended] = it.heard()
            assert isinstance(ended, ReadEnded)
            assert (ended.corrupt, ended.peer_lost, ended.may_still_write) == (hit, False, False)
            assert (ended.error is not None) == hit
            if hit:
                block = dst[place.token // own.layout.block_size]
                assert (
                    f"1 checksums of its KV do not fit what was read: in block {block} from token {place.token} on"
                    in (ended.error or "")
                )
                assert f"heads {place.head} to {place.head}, layers {place.layer} to {place.layer}" in (
                    ended.error or ""
                )
    finally:
        it.close()


@pytest.fixture
def pair() -> tuple[list[Memory], Memory, Rig]:
    """Two ranks to one, 8 tokens in blocks of 4."""
    there = [Memory.of(layout) for layout in layouts(2, 1, 4, block_major)]
    own = Memory.of(layouts(1, 1, 4, block_major)[0])
    for memory in there:
        memory.compute([0, 1], world(8), [0, 8])
    transport = FakeTransport({f"p/{n}": memory.bytes for n, memory in enumerate(there)}, own.bytes)
    it = Rig(transport, [own.layout], verifier=own.checksums)
    return there, own, it


def ended(it: Rig, *orders: Any) -> ReadEnded:
    it.tell(*orders)
    report = it.heard()[-1]
    assert isinstance(report, ReadEnded)
    return report


READ = ReadOrder(1, 1, "r", [0, 1], [2, 3], 0, 8, True)


def test_right_bytes_of_the_wrong_blocks_do_not_fit(pair: tuple[list[Memory], Memory, Rig]) -> None:
    there, _, it = pair
    it.tell(OpenPeer(1, descriptors(there)))
    assert ended(it, READ).error is None
    swapped = ended(it, msgspec.structs.replace(READ, source_blocks=[1, 0]))
    assert swapped.corrupt
    assert ended(it, msgspec.structs.replace(READ, source_blocks=[0, 2])).corrupt  # nobody has written it
    it.close()


def test_long_reads_are_verified_piece_by_piece_while_others_go_on(
    pair: tuple[list[Memory], Memory, Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    there, own, it = pair
    monkeypatch.setattr("tandem.transfer.thread.verification.PIECE_BYTES", 2 * own.checksums.token_bytes)
    assert own.checksums.token_bytes < PIECE_BYTES
    it.tell(OpenPeer(1, descriptors(there)), READ)
    assert [type(report) for report in it.heard()] == [PeerOpened]
    for _ in range(2):
        it.step()
        assert it.heard() == []
    it.step()
    assert [type(report) for report in it.heard()] == [ReadEnded]
    it.close()


def test_a_source_without_checksums_is_an_error(pair: tuple[list[Memory], Memory, Rig]) -> None:
    there, _, it = pair
    bare = [msgspec.structs.replace(one, checksums=None) for one in descriptors(there)]
    it.tell(OpenPeer(1, bare))
    [opened] = it.heard()
    assert isinstance(opened, PeerOpened)
    assert "checksums" in (opened.error or "")
    it.close()


@pytest.mark.parametrize(("dtype", "dim"), [(torch.bfloat16, 3), (torch.float16, 2), (torch.float32, 5)])
def test_every_bit_counts_in_every_dtype_also_of_a_latent(dtype: torch.dtype, dim: int) -> None:
    one = shard(2, 1, tp=1, pp=1, tp_rank=0, pp_rank=0)
    layout = latent(one, blocks=1, block_size=2, latent_dim=dim, itemsize=dtype.itemsize)
    memory = Memory.of(layout, dtype)
    new = torch.arange(1, 2 * dim + 1, dtype=dtype).reshape(2, 1, dim)
    held = (
        torch.from_numpy(memory.bytes[: layout.nbytes]).view(dtype).view(layout.shape)
    )  # block head layer kv token dim
    slots = memory.checksums.slots(torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([0, 1]))
    for layer in range(2):
        held[0, 0, layer, 0] = new[:, 0]
        memory.checksums.write(slots, layer, new)
    assert memory.checksums.mismatches([0], 0, 2) == []
    for byte in range(layout.nbytes):
        for bit in range(8):
            memory.bytes[byte] ^= 1 << bit
            assert len(memory.checksums.mismatches([0], 0, 2)) == 1, (byte, bit)
            memory.bytes[byte] ^= 1 << bit
