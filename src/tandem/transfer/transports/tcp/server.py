"""The serving side of the tcp transport: lets peers read this rank's region, and nothing else."""

from __future__ import annotations

import ctypes
import logging
from typing import Any

import numpy as np
import zmq
from numpy.typing import NDArray

from tandem.errors import TransferError, WireError
from tandem.transfer.transports.base import Region
from tandem.transfer.transports.bounds import require_inside
from tandem.transfer.transports.tcp.protocol import ANSWERS, FETCHES, PIECE_BYTES, Fetch, FetchPiece, FetchRefused
from tandem.wire.receiving import DroppedMessages

log = logging.getLogger(__name__)

MAX_FETCHES_PER_POLL = 64

Memory = NDArray[np.uint8]


def host_memory(region: Region) -> Memory:
    """Return the region as bytes: a view that does not keep the memory alive.

    Raises:
        TransferError: the memory is on a GPU, or there is none.
    """
    if region.device >= 0:
        raise TransferError(
            "the tcp connector reads and writes host memory only; for GPU memory use `--connector nixl`"
        )
    if region.address <= 0 or region.length <= 0:
        raise TransferError(f"no memory: {region.length} bytes at address {region.address}")
    return np.ctypeslib.as_array((ctypes.c_uint8 * region.length).from_address(region.address))


class Server:
    """Answers fetches from a bound ROUTER socket.

    A reader that fetches more than it receives loses answers, and no other is affected: what waits for one reader is
    bounded by the socket's high-water mark.

    Args:
        agent: this rank; fetches for another agent are refused.
        memory: what may be read.
        socket: a ROUTER with ROUTER_MANDATORY.
    """

    def __init__(self, agent: str, memory: Memory, socket: zmq.Socket[bytes]) -> None:
        self._agent = agent
        self._memory = memory
        self.socket = socket
        self._dropped = DroppedMessages(log, f"{agent}: fetch")

    def poll(self) -> None:
        """Answer what has arrived, up to MAX_FETCHES_PER_POLL fetches."""
        for _ in range(MAX_FETCHES_PER_POLL):
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._answer(frames)

    def _answer(self, frames: list[bytes]) -> None:
        try:
            if len(frames) != 2:
                raise WireError(f"{len(frames) - 1} frames where a fetch has 1")
            fetch = FETCHES.decode(frames[1])
        except WireError as error:
            self._dropped.add(error)
            return
        try:
            answer: list[Any] = [ANSWERS.encode(FetchPiece(self._agent, fetch.read, fetch.piece)), self._bytes(fetch)]
        except (TransferError, WireError) as error:
            answer = [ANSWERS.encode(FetchRefused(self._agent, fetch.read, str(error)))]
        self._send([frames[0], *answer])

    def _bytes(self, fetch: Fetch) -> Memory:
        if fetch.to != self._agent:
            raise TransferError(f"this is {self._agent}, not {fetch.to}")
        offsets, lengths = fetch.runs()
        require_inside(offsets, lengths, len(self._memory), "served")
        # The runs are inside of the region, so their sum overflows only if there are 2^63 bytes of memory.
        total = int(lengths.sum())
        if total > PIECE_BYTES:
            raise TransferError(f"a piece of {total} bytes; at most {PIECE_BYTES} are sent at once")
        if len(offsets) == 1:
            return self._memory[offsets[0] : offsets[0] + total]
        return gather(self._memory, offsets, lengths, total)

    def _send(self, frames: list[Any]) -> None:
        try:
            self.socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            log.debug("%s: answer dropped: %s", self._agent, error)


def gather(memory: Memory, offsets: NDArray[np.int64], lengths: NDArray[np.int64], total: int) -> Memory:
    """Copy the bytes of all runs, one after the other, into new memory."""
    gathered = np.empty(total, dtype=np.uint8)
    at = 0
    for offset, length in zip(offsets.tolist(), lengths.tolist(), strict=True):
        gathered[at : at + length] = memory[offset : offset + length]
        at += length
    return gathered


def scatter(data: Memory, memory: Memory, offsets: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
    """Copy bytes that `gather` put one after the other to where their runs are."""
    at = 0
    for offset, length in zip(offsets.tolist(), lengths.tolist(), strict=True):
        memory[offset : offset + length] = data[at : at + length]
        at += length
