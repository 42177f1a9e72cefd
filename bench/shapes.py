"""What a hand-off between unlike shapes moves, beside one contiguous read of as many bytes.

`python bench/shapes.py` starts engines of several shapes, hands a prompt of --tokens tokens over each pair, and prints
descriptors, bytes and GB/s as the decode engine saw them. The last column is a single read of the same bytes between
two processes of this machine over the same transport.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

from scripts.make_random_model import RandomModel, write_random_model
from tests.support.fleet import Fleet, Shape

from tandem.kv.runs import Runs
from tandem.transfer.transports.base import ReadState, Region, Transport
from tandem.transfer.transports.registry import transport_factory

PAIRS = [("tp2", "tp1"), ("tp1", "tp2"), ("pp2", "tp2"), ("tp2", "pp2"), ("tp1", "tp1-block32")]
ROUNDS = 5


def serve_bytes(pipe: Connection, connector: str, size: int) -> None:
    memory = np.ones(size, dtype=np.uint8)
    transport = transport_factory(connector, None)("source", "127.0.0.1")
    transport.register(Region(memory.ctypes.data, size))
    pipe.send(transport.describe())
    while not pipe.poll():
        transport.poll()
        time.sleep(0.0002)
    transport.close()


def single_read(connector: str, size: int) -> float:
    """Seconds of one contiguous read of `size` bytes; the best of several."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve_bytes, args=(theirs, connector, size))
    process.start()
    memory = np.zeros(size, dtype=np.uint8)
    transport = transport_factory(connector, None)("sink", "127.0.0.1")
    transport.register(Region(memory.ctypes.data, size))
    try:
        transport.connect(ours.recv())
        return sorted(_read(transport, size) for _ in range(ROUNDS + 1))[ROUNDS // 2]
    finally:
        ours.send("end")
        process.join()
        transport.close()


def _read(transport: Transport, size: int) -> float:
    zero = np.zeros(1, dtype=np.int64)
    began = time.perf_counter()
    read = transport.post("source", Runs(zero, zero, np.array([size], dtype=np.int64)))
    while read.state is ReadState.IN_PROGRESS:
        transport.poll()
    if read.state is not ReadState.DONE:
        raise RuntimeError(read.error)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--connector", default="nixl")
    options = parser.parse_args()
    table = Table(title=f"python {' '.join(sys.argv)}")
    for column in ("pair", "blocks", "descriptors", "per block and source rank", "MB", "GB/s", "single read GB/s"):
        table.add_column(column, justify="right")
    shape = RandomModel(
        family="qwen3", hidden=128, layers=8, heads=8, kv_heads=4, head_dim=64, intermediate=128, vocab=300,
        dtype="float32", max_positions=4096,
    )  # fmt: skip
    shapes = [Shape(1), Shape(2), Shape(1, 2), Shape(1, 1, 32)]
    with tempfile.TemporaryDirectory() as folder:
        model = write_random_model(Path(folder) / "random", shape)
        fleet = Fleet(model, shapes, options.connector, kv_memory=1 << 28, max_batched_tokens=4096)
        try:
            for source, sink in PAIRS:
                table.add_row(*row(fleet, source, sink, options.tokens, options.connector))
        finally:
            fleet.close()
    Console(width=120).print(table)


def row(fleet: Fleet, source: str, sink: str, tokens: int, connector: str) -> list[str]:
    seconds, how = [], None
    for turn in range(ROUNDS):
        prompt = random.Random(f"{source} {sink} {turn}").choices(range(3, 250), k=tokens)
        _, last = fleet.answer(source, sink, prompt, 2)
        how = last.details
        assert how is not None
        seconds.append(how.transfer_time)
    assert how is not None
    middle = sorted(seconds)[ROUNDS // 2]
    ranks = {"tp1": 1, "tp2": 2, "pp2": 2, "tp1-block32": 1}[source]
    blocks = -(-tokens // 16)
    alone = single_read(connector, how.bytes)
    return [
        f"{source} -> {sink}",
        str(blocks),
        str(how.descriptors),
        f"{how.descriptors / blocks / ranks:.2f}",
        f"{how.bytes / 1e6:.1f}",
        f"{how.bytes / middle / 1e9:.2f}",
        f"{how.bytes / alone / 1e9:.2f}",
    ]


if __name__ == "__main__":
    main()
