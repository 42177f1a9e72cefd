"""Reads between two nodes with the transport that engines would use: do the bytes come, how soon, how fast."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import msgspec
import numpy as np
import torch
import zmq

from tandem.doctor.links import Link, NodeMemory, Step
from tandem.doctor.store_exchange import StoreExchange
from tandem.errors import ConfigError, TransferError
from tandem.kv.runs import Runs
from tandem.transfer.transports.base import RankEndpoint, ReadState, Region, Transport

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
"""Links that have not begun by then are left out."""
IDLE_SECONDS = 0.002


class ProbeMemory:
    """Two halves of `half` bytes (a multiple of 8): the first is read by others, the second is read into.

    The k-th 64-bit word of the first half of node n is n * 2^40 + k + 1, by which readers tell that bytes are right.
    """

    def __init__(self, half: int, node: int, device: torch.device) -> None:
        self.half = half
        self.words = torch.zeros(2 * half // 8, dtype=torch.int64, device=device)
        self.words[: half // 8] = self._expected(node, half)

    @property
    def region(self) -> Region:
        device = self.words.device
        return Region(self.words.data_ptr(), 2 * self.half, -1 if device.type == "cpu" else (device.index or 0))

    def clear(self) -> None:
        """Empty the second half, so that bytes of an earlier read are not taken for those of a later one."""
        self.words[self.half // 8 :] = 0

    def holds(self, node: int, length: int) -> bool:
        """Return whether the second half starts with `length` bytes of that node's first half."""
        start = self.half // 8
        return torch.equal(self.words[start : start + length // 8], self._expected(node, length))

    def _expected(self, node: int, length: int) -> torch.Tensor:
        first = (node << 40) + 1
        return torch.arange(first, first + length // 8, dtype=torch.int64, device=self.words.device)


class ReadProbe:
    """The part of one node in the reads: reads from others, and serves their reads."""

    def __init__(self, transport: Transport, memory: ProbeMemory) -> None:
        self._transport = transport
        self._memory = memory
        self._deadline = 0.0
        transport.register(memory.region)

    def serve(self) -> None:
        """Make progress with reads of others from here; wait a little for something to do."""
        self._wait(IDLE_SECONDS)
        self._transport.poll()

    def measure(self, link: Link, source: RankEndpoint) -> Link:
        """Return `link` with what reading from its source shows. Raises nothing: a failure is in the result."""
        self._deadline = time.monotonic() + PAIR_SECONDS
        try:
            self._transport.connect(source)
            self._read(source, SMALL_BYTES)
            latency = statistics.median(self._read(source, SMALL_BYTES) for _ in range(SMALL_READS))
            link = msgspec.structs.replace(link, latency=latency)
            return msgspec.structs.replace(link, speed=self._speed(link.source, source))
        except (TransferError, ConfigError) as error:
            return link.failure(Step.READ, str(error))

    def _speed(self, node: int, source: RankEndpoint) -> float:
        first = FIRST_BYTES / self._read(source, FIRST_BYTES)
        bulk = min(BULK_BYTES, max(FIRST_BYTES, int(first * BULK_SECONDS) // RUN_BYTES * RUN_BYTES))
        self._memory.clear()
        seconds = self._read(source, bulk)
        if not self._memory.holds(node, bulk):
            raise TransferError("the read ended without an error, but brought other bytes than were there")
        return bulk / seconds

    def _read(self, source: RankEndpoint, length: int) -> float:
        """Return the seconds that a read of `length` bytes in runs of RUN_BYTES takes."""
        starts = np.arange(0, length, RUN_BYTES, dtype=np.int64)
        runs = Runs(starts, starts + self._memory.half, np.minimum(length - starts, RUN_BYTES))
        started = time.monotonic()
        deadline = min(started + READ_SECONDS, self._deadline)
        read = self._transport.post(source.agent, runs)
        while read.state is ReadState.IN_PROGRESS:
            if time.monotonic() > deadline:
                raise TransferError(f"a read of {length} bytes had not ended after {deadline - started:.0f} s")
            self._wait(20e-6)
            self._transport.poll()
        if read.state is not ReadState.DONE:
            raise TransferError(read.error or "the read failed")
        return time.monotonic() - started

    def _wait(self, idle: float) -> None:
        """Wait until one of the transport's sockets has something, 1 ms at most; without any, for `idle` seconds."""
        handles = self._transport.wait_on()
        if not handles:
            time.sleep(idle)
            return
        poller = zmq.Poller()
        for handle in handles:
            poller.register(handle, zmq.POLLIN)
        poller.poll(1)


def measure_all(
    probe: ReadProbe | None, memories: Sequence[NodeMemory], links: Sequence[Link], exchange: StoreExchange
) -> list[Link]:
    """Read over every link, one at a time, so that each has the network to itself; return the same on all nodes.

    Args:
        probe: of this node; None if it could not start.
        links: in the order in which they are measured.
        exchange: makes each result known to all.
    """
    deadline = time.monotonic() + ALL_SECONDS
    measured = []
    silent: set[int] = set()
    for link in links:
        key = f"link/{link.reader}/{link.source}"
        if link.reader == exchange.own:
            result = _measured(probe, memories[link.source], link, late=time.monotonic() > deadline)
            exchange.put(key, result)
        else:
            patience = 0.0 if link.reader in silent else TURN_SECONDS
            heard = exchange.get(key, Link, patience, probe.serve if probe is not None else None)
            if heard is None:
                silent.add(link.reader)
            result = heard or link.failure(Step.READER, f"node {link.reader} fell silent")
        measured.append(result)
    return measured


def _measured(probe: ReadProbe | None, source: NodeMemory, link: Link, *, late: bool) -> Link:
    if probe is None:
        return link.failure(Step.START, f"node {link.reader} is not ready to read")
    if late:
        return link.failure(Step.TIME, f"not tried: {ALL_SECONDS:.0f} s were over")
    if source.endpoint is None:
        return link.failure(Step.START, f"node {source.node} is not ready to be read from")
    return probe.measure(link, source.endpoint)
