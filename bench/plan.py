"""Times KV transfer planning: what one destination rank spends on the blocks of one request.

PYTHONPATH=src python bench/plan.py [--blocks 10000] [--repeat 5]

One line for each pair of engines: how many sources rank 0 of the destination reads from, in how many runs of
which mean size, the median time that `TransferPlan.runs` takes for them, and the time of `plan`, spent once
for the pair.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from tandem.kv.layout import KvLayout, block_major, latent, layer_major, token_major
from tandem.kv.plan import TransferPlan, plan
from tandem.kv.shard import shard

LAYERS, KV_HEADS, HEAD_DIM, ITEMSIZE, LATENT_DIM = 80, 8, 128, 2, 576


class Engine(NamedTuple):
    layout: Callable[..., KvLayout] = block_major
    tp: int = 8
    pp: int = 1
    block_size: int = 16

    def ranks(self, tokens: int) -> list[KvLayout]:
        mla = self.layout is latent
        dim = {"latent_dim": LATENT_DIM} if mla else {"head_dim": HEAD_DIM}
        return [
            self.layout(
                shard(LAYERS, 1 if mla else KV_HEADS, tp=self.tp, pp=self.pp, tp_rank=t, pp_rank=p),
                blocks=2 * -(-tokens // self.block_size),
                block_size=self.block_size,
                itemsize=ITEMSIZE,
                **dim,
            )
            for p in range(self.pp)
            for t in range(self.tp)
        ]

    def __str__(self) -> str:
        return f"{self.layout.__name__} tp{self.tp} pp{self.pp} block {self.block_size}"


class Case(NamedTuple):
    src: Engine
    dst: Engine
    share: int = 1
    """Plans one block in `share`: these pairs need very many runs."""
    consecutive: bool = False


CASES = (
    Case(Engine(), Engine()),
    Case(Engine(), Engine(), consecutive=True),
    Case(Engine(tp=8), Engine(tp=4)),
    Case(Engine(tp=8), Engine(tp=1)),
    Case(Engine(tp=2), Engine(tp=8)),
    Case(Engine(tp=6), Engine(tp=4)),
    Case(Engine(tp=16), Engine(tp=4)),
    Case(Engine(pp=4), Engine()),
    Case(Engine(pp=3), Engine(pp=2)),
    Case(Engine(tp=2, pp=4), Engine(tp=1)),
    Case(Engine(layer_major), Engine(layer_major, pp=2)),
    Case(Engine(layer_major), Engine(layer_major), consecutive=True),
    Case(Engine(latent, tp=4), Engine(latent, tp=8)),
    Case(Engine(latent, pp=4), Engine(latent, tp=8)),
    Case(Engine(block_size=16), Engine(block_size=32)),
    Case(Engine(block_size=32), Engine(block_size=16)),
    Case(Engine(block_size=16), Engine(block_size=24)),
    Case(Engine(tp=1, block_size=16), Engine(tp=1, block_size=32), share=10),
    Case(Engine(tp=4, block_size=16), Engine(tp=2, block_size=64)),
    Case(Engine(token_major), Engine(token_major, pp=2)),
    Case(Engine(token_major, block_size=16), Engine(token_major, block_size=32)),
    Case(Engine(token_major, tp=2), Engine(token_major, tp=4), share=10),
    Case(Engine(token_major), Engine(block_major), share=10),
    Case(Engine(token_major, tp=4), Engine(block_major, tp=2), share=10),
)


def blocks(engine: Engine, tokens: int, seed: int, *, consecutive: bool) -> np.ndarray:
    count = -(-tokens // engine.block_size)
    return np.arange(count) if consecutive else np.random.default_rng(seed).permutation(2 * count)[:count]


def timed(planned: TransferPlan, case: Case, tokens: int, repeat: int) -> tuple[float, int, int]:
    src = blocks(case.src, tokens, 1, consecutive=case.consecutive)
    dst = blocks(case.dst, tokens, 2, consecutive=case.consecutive)
    seconds = []
    for _ in range(repeat):
        begin = time.perf_counter()
        runs = planned.runs(src, dst, 0, tokens, whole_tail=True)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds), sum(map(len, runs.values())), sum(r.nbytes for r in runs.values())


def report(case: Case, tokens: int, repeat: int) -> str:
    begin = time.perf_counter()
    planned = plan(case.src.ranks(tokens), case.dst.ranks(tokens), 0)
    pair_ms = (time.perf_counter() - begin) * 1e3
    tokens //= case.share
    seconds, runs, nbytes = timed(planned, case, tokens - 3, repeat)
    return row(
        (
            str(case.src),
            str(case.dst),
            "side by side" if case.consecutive else "scattered",
            f"{tokens:,}",
            str(len(planned.sources)),
            f"{runs:,}",
            f"{nbytes / runs / 1024:,.2f}",
            f"{seconds * 1e3:.1f}",
            f"{pair_ms:.1f}",
        )
    )


def row(cells: Sequence[str]) -> str:
    widths = (-33, -33, -13, 8, 8, 12, 11, 8, 8)
    return " ".join(f"{cell:<{-w}}" if w < 0 else f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--blocks", type=int, default=10_000, help="blocks of 16 tokens in the request")
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{LAYERS} layers, {KV_HEADS} KV heads of {HEAD_DIM} (latent: 1 of {LATENT_DIM}) x {ITEMSIZE} bytes")
    print(
        row(
            (
                "source",
                "destination",
                "blocks are",
                "tokens",
                "sources",
                "runs",
                "KiB a run",
                "runs ms",
                "plan ms",
            )
        )
    )
    for case in CASES:
        print(report(case, arguments.blocks * 16, arguments.repeat), flush=True)


if __name__ == "__main__":
    main()
