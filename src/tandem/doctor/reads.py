"""Reads between two nodes with the transport that engines would use: do the bytes come, how soon, how fast."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import msgspec
import numpy as np
import zmq

from tandem.doctor.board import Board
from tandem.doctor.cluster_messages import NodeMemory, Reach
from tandem.doctor.slab import Slab
from tandem.errors import ConfigError, TransferError
from tandem.kv.runs import Runs
from tandem.transfer.transports.base import RankEndpoint, ReadState, Transport

RUN_BYTES = 256 * 1024
FIRST_BYTES = 4 * 1024 * 1024
BULK_BYTES = 64 * 1024 * 1024
BULK_SECONDS = 3.0
"""A read of BULK_BYTES is made shorter if the first one says that it would take longer than this."""
SMALL_BYTES = 4096
SMALL_READS = 20
READ_SECONDS = 8.0
PAIR_SECONDS = 20.0
"""Longest that everything with one node may take."""
TURN_SECONDS = 2 * PAIR_SECONDS
"""After which a node is not waited for any more: it hangs or is gone."""
ALL_SECONDS = 300.0
"""Pairs that have not begun by then are left out."""


class Node:
    """This node's part in the reads: its memory and its transport."""

    def __init__(self, transport: Transport, slab: Slab) -> None:
        self._transport = transport
        self._slab = slab
        self._pair_ends = 0.0

    def serve(self) -> None:
        """Move on whatever others read from here; waits a little for something to do."""
        self._wait(idle=0.002)
        self._transport.poll()

    def read_from(self, known: Reach, source: NodeMemory) -> Reach:
        """`known` with what reading from that node shows. Raises nothing: what goes wrong is in the result."""
        if source.endpoint is None:
            return msgspec.structs.replace(
                known, error=f"node {source.node} is not ready to be read from", step="start"
            )
        self._pair_ends = time.monotonic() + PAIR_SECONDS
        try:
            self._transport.connect(source.endpoint)
            known = msgspec.structs.replace(known, latency=self._latency(source.endpoint))
            return msgspec.structs.replace(known, speed=self._speed(source.node, source.endpoint))
        except (TransferError, ConfigError) as error:
            return msgspec.structs.replace(known, error=str(error), step="read")

    def _latency(self, source: RankEndpoint) -> float:
        self._read(source, SMALL_BYTES)
        return statistics.median(self._read(source, SMALL_BYTES) for _ in range(SMALL_READS))

    def _speed(self, node: int, source: RankEndpoint) -> float:
        first = FIRST_BYTES / self._read(source, FIRST_BYTES)
        bulk = min(BULK_BYTES, max(FIRST_BYTES, int(first * BULK_SECONDS) // RUN_BYTES * RUN_BYTES))
        self._slab.forget()
        seconds = self._read(source, bulk)
        if not self._slab.holds(node, bulk):
            raise TransferError("the read ended without an error, but brought other bytes than were there")
        return bulk / seconds

    def _read(self, source: RankEndpoint, length: int) -> float:
        """Seconds for a read of `length` bytes in runs of RUN_BYTES."""
        starts = np.arange(0, length, RUN_BYTES, dtype=np.int64)
        lengths = np.minimum(length - starts, RUN_BYTES)
        started = time.monotonic()
        deadline = min(started + READ_SECONDS, self._pair_ends)
        read = self._transport.post(source.agent, Runs(starts, starts + self._slab.half, lengths))
        while read.state is ReadState.IN_PROGRESS:
            if time.monotonic() > deadline:
                raise TransferError(f"a read of {length} bytes had not ended after {deadline - started:.0f} s")
            self._wait()
            self._transport.poll()
        if read.state is not ReadState.DONE:
            raise TransferError(read.error or "the read failed")
        return time.monotonic() - started

    def _wait(self, idle: float = 20e-6) -> None:
        """Until one of the transport's sockets has something, 1 ms at most; without any, for `idle` seconds."""
        handles = self._transport.wait_on()
        if not handles:
            time.sleep(idle)
            return
        poller = zmq.Poller()
        for handle in handles:
            poller.register(handle, zmq.POLLIN)
        poller.poll(1)


def all_pairs(
    node: Node | None, own: int, memories: Sequence[NodeMemory], known: list[Reach], board: Board
) -> list[Reach]:
    """Every node reads from every other, one pair at a time, so that each has the network to itself.

    Args:
        node: this node; None if it could not start.
        own: its number.
        known: what is known of each pair, in the order in which they are to read.
        board: where each result is made known to all.
    """
    deadline = time.monotonic() + ALL_SECONDS
    results = []
    silent: set[int] = set()
    for pair in known:
        key = f"reach/{pair.reader}/{pair.source}"
        if pair.reader == own:
            result = _own_turn(node, memories[pair.source], pair, late=time.monotonic() > deadline)
            board.put(key, result)
        else:
            patience = 0.0 if pair.reader in silent else TURN_SECONDS
            serve = node.serve if node is not None else _idle
            heard = board.get_while(key, Reach, patience, serve)
            if heard is None:
                silent.add(pair.reader)
            words = f"node {pair.reader} fell silent"
            result = heard or msgspec.structs.replace(pair, error=words, step="reader")
        results.append(result)
    return results


def _own_turn(node: Node | None, source: NodeMemory, pair: Reach, *, late: bool) -> Reach:
    if node is None:
        return msgspec.structs.replace(pair, error=f"node {pair.reader} is not ready to read", step="start")
    if late:
        return msgspec.structs.replace(pair, error=f"not tried: {ALL_SECONDS:.0f} s were over", step="time")
    return node.read_from(pair, source)


def _idle() -> None:
    time.sleep(0.002)
