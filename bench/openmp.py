"""Servers that differ in their OpenMP settings, resident side by side and loaded in turn.

python bench/openmp.py --model DIR [--shape aggregated|pd|tp2] [--rounds 5]
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from statistics import median

from server import DEMO_MODEL, heading, served

from tandem.commands.bench import measure
from tandem.commands.workload import Workload

ENVIRONMENTS = {
    "chosen": {},
    "libgomp, GOMP_SPINCOUNT=300": {"GOMP_SPINCOUNT": "300"},
    "libgomp, passive": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"},
    "libiomp5, KMP_BLOCKTIME=0": {"KMP_BLOCKTIME": "0"},
}
SHAPES = {
    "aggregated": ["--prefill", 0],
    "pd": [],
    "tp2": ["--prefill", 0, "--decode-tp", 2],
}
LOADS = {"1 x 512/64": (1, 512, 64), "32 x 16/64": (32, 16, 64)}


@contextmanager
def environment(settings: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


async def alternate(urls: dict[str, str], rounds: int) -> dict[tuple[str, str], dict[str, list[float]]]:
    """Milliseconds of TTFT and ITL, and output tokens a second, by server and load; a median of each round."""
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for turn in range(rounds):
        for name, url in urls.items():
            for load, (requests, prompt, output) in LOADS.items():
                workload = Workload(url=url, input_len=prompt, output_len=output, num_prompts=requests, seed=turn)
                measured = await measure(workload)
                one = found[name, load]
                one["TTFT"].append(1e3 * median(record.ttft for record in measured.records))
                one["ITL"].append(1e3 * median(gap for record in measured.records for gap in record.itl))
                one["tok/s"].append(sum(record.output_tokens for record in measured.records) / measured.duration)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_MODEL))
    parser.add_argument("--shape", choices=SHAPES, default="aggregated")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(heading())
    with ExitStack() as stack:
        urls = {}
        for name, settings in ENVIRONMENTS.items():
            with environment(settings):
                urls[name] = stack.enter_context(served(options.model, *SHAPES[options.shape], "--kv-memory", "256MiB"))
        found = asyncio.run(alternate(urls, options.rounds))
    print(heading().splitlines()[-1])
    print(f"{'medians':30} {'load':12} {'TTFT ms':>9} {'ITL ms':>9} {'tok/s':>9}")
    for (name, load), one in found.items():
        print(f"{name:30} {load:12} " + " ".join(f"{median(one[what]):9.1f}" for what in ("TTFT", "ITL", "tok/s")))


if __name__ == "__main__":
    main()
