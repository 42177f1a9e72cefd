"""Identity exchange and handshake of engines of many ranks on this machine.

`python bench/handshake.py --ranks 2 16` starts, for each count, two engines of so many tensor-parallel ranks, with
random weights, makes one decode from the other, and prints how long agreeing on the identity and the handshake took.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

from scripts.make_random_model import RandomModel, write_random_model
from tests.support.fleet import Fleet, Shape


def measure(model: Path, ranks: int, connector: str) -> tuple[float, float, int]:
    """Seconds of the identity collective and of the handshake, and ranks that were ready."""
    prefill, decode = Shape(ranks), Shape(ranks, 1, 32)
    fleet = Fleet(model, [prefill, decode], connector)
    try:
        fleet.introduce(prefill.name, decode.name)
        status = fleet.wait_for_peer(decode.name, prefill.name)
        assert status.handshake_time is not None
        return fleet.status(prefill.name).identity_time, status.handshake_time, ranks
    finally:
        fleet.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--connector", default="nixl")
    options = parser.parse_args()
    table = Table(title=f"python {' '.join(sys.argv)}")
    for column in ("ranks -> ranks", "identity exchange ms", "handshake to all ranks ready ms"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        shape = RandomModel(
            family="qwen3", hidden=64, layers=2, heads=16, kv_heads=16, head_dim=16, intermediate=64, vocab=300,
            dtype="float32",
        )  # fmt: skip
        model = write_random_model(Path(folder) / "random", shape)
        for ranks in options.ranks:
            identity, handshake, _ = measure(model, ranks, options.connector)
            table.add_row(f"{ranks} -> {ranks}", f"{identity * 1000:.1f}", f"{handshake * 1000:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
