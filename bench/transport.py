"""The speed of a transport that reads between two processes of this machine.

python bench/transport.py [--transport nixl] [--transport tcp] [--mib 256] [--repeats 5] [--curve]
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection

import numpy as np
import zmq

from tandem.kv.runs import Runs
from tandem.transfer.transports.base import ReadState, Region, Transport
from tandem.transfer.transports.registry import TRANSPORT_NAMES, transport_factory
from tandem.wire.keys import ClusterKey, new_key

MIB = 1024 * 1024


def wait(transport: Transport, pipe: Connection | None = None) -> None:
    poller = zmq.Poller()
    for handle in transport.wait_on():
        poller.register(handle, zmq.POLLIN)
    if pipe is not None:
        poller.register(pipe.fileno(), zmq.POLLIN)
        poller.poll(50)
    elif transport.wait_on():
        poller.poll(1)
    transport.poll()


def serve(pipe: Connection, name: str, size: int, key: ClusterKey | None) -> None:
    memory = np.full(size, 7, dtype=np.uint8)
    transport = transport_factory(name, key)("server", "127.0.0.1")
    transport.register(Region(memory.ctypes.data, size))
    pipe.send(transport.describe())
    while not pipe.poll():
        wait(transport, pipe)
    transport.close()


def blocks(size: int, block: int) -> Runs:
    """Return every second block of the region, in shuffled order: nothing that could be merged."""
    starts = np.arange(0, size - block + 1, 2 * block, dtype=np.int64)
    shuffled = np.random.default_rng(0).permutation(starts)
    return Runs(starts, shuffled, np.full(len(starts), block, dtype=np.int64))


def one_run(length: int) -> Runs:
    zero = np.zeros(1, dtype=np.int64)
    return Runs(zero, zero, np.array([length], dtype=np.int64))


def measure(name: str, size: int, repeats: int, key: ClusterKey | None) -> None:
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    server = context.Process(target=serve, args=(theirs, name, size, key), daemon=True)
    server.start()
    memory = np.zeros(size, dtype=np.uint8)
    transport = transport_factory(name, key)("reader", "127.0.0.1")
    transport.register(Region(memory.ctypes.data, size))
    endpoint = pipe.recv()
    started = time.perf_counter()
    transport.connect(endpoint)

    def read(runs: Runs) -> tuple[float, float, float]:
        begin = time.perf_counter()
        one = transport.post("server", runs)
        posted = longest = time.perf_counter() - begin
        while one.state is ReadState.IN_PROGRESS:
            before = time.perf_counter()
            wait(transport)
            longest = max(longest, time.perf_counter() - before)
        if one.state is not ReadState.DONE:
            raise SystemExit(f"read failed: {one.error}")
        return time.perf_counter() - begin, posted, longest

    read(one_run(8))
    print(f"{name}{' with CURVE' if key else ''}: connect and first read {time.perf_counter() - started:.4f} s")
    cases = {"8 B": one_run(8), "64 KiB": one_run(65536), f"{size // MIB} MiB in one run": one_run(size)}
    for block in (262144, 65536, 8192):
        cases[f"{size // MIB // 2} MiB in runs of {block // 1024} KiB"] = blocks(size, block)
    for case, runs in cases.items():
        read(runs)
        times = [read(runs) for _ in range(repeats if runs.nbytes > MIB else 20 * repeats)]
        total, posted, longest = (statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"  {case:32} {len(runs):6} runs  {total * 1e3:9.3f} ms  {runs.nbytes / total / 1e9:6.2f} GB/s"
            f"  post {posted * 1e3:8.3f} ms  longest call {longest * 1e3:8.3f} ms"
        )
    transport.close()
    pipe.send("end")
    server.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", action="append", choices=TRANSPORT_NAMES)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--curve", action="store_true", help="with a cluster key")
    arguments = parser.parse_args()
    for name in arguments.transport or TRANSPORT_NAMES:
        measure(name, arguments.mib * MIB, arguments.repeats, new_key() if arguments.curve else None)


if __name__ == "__main__":
    main()
