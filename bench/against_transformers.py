"""One request at a time on a random 0.1 B bf16 model of Qwen3's shape: transformers' own loop, aggregated, and PD.

python bench/against_transformers.py [--input-len 512] [--output-len 64] [--requests 5] [--threads N] [--model FOLDER]

The three take turns in one run. transformers runs in this process, without HTTP; both Tandem servers answer over HTTP.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import torch
from server import heading, served
from transformers import AutoModelForCausalLM

from tandem.commands.bench import Workload, measure
from tandem.commands.bench_report import spread

SHAPE = {
    "hidden": 768,
    "layers": 12,
    "heads": 12,
    "kv-heads": 4,
    "head-dim": 64,
    "intermediate": 2304,
    "vocab": 32768,
}
Times = tuple[float, list[float]]
"""Time to first token and inter-token latencies of one request, in seconds."""


class Clock:
    """A streamer for `generate`: it is called with the prompt, and then with every token."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.calls: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        self.calls.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def times(self) -> Times:
        tokens = self.calls[1:]
        return tokens[0] - self.begin, [later - earlier for earlier, later in pairwise(tokens)]


class Transformers:
    def __init__(self, folder: str, output_len: int) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self._output_len = output_len

    def generate(self, prompt: list[int]) -> Times:
        ids = torch.tensor([prompt])
        clock = Clock()
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=self._output_len,
            max_new_tokens=self._output_len,
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
        )
        return clock.times


def make_model(folder: str) -> str:
    script = Path(__file__).parent.parent / "scripts" / "make_random_model.py"
    shape = [part for name, size in SHAPE.items() for part in (f"--{name}", str(size))]
    command = [sys.executable, str(script), "--out", folder, "--dtype", "bfloat16", *shape]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def ask(load: Workload) -> list[Times]:
    records = asyncio.run(measure(load)).records
    for record in records:
        if record.error is not None:
            raise SystemExit(record.error)
    return [(record.ttft, record.itl) for record in records]


def compare(folder: str, options: argparse.Namespace, urls: dict[str, str]) -> dict[str, list[Times]]:
    """All of them in turn, with the same prompts; one round more, at the start, is not counted."""
    theirs = Transformers(folder, options.output_len)
    found: dict[str, list[Times]] = {"transformers": [], **{name: [] for name in urls}}
    for turn in range(options.requests + 1):
        load = Workload(
            url="", input_len=options.input_len, output_len=options.output_len, num_prompts=1, seed=turn, warmup=0
        )
        round_: dict[str, list[Times]] = {"transformers": [theirs.generate(load.prompts()[0])]}
        for name, url in urls.items():
            round_[name] = ask(
                Workload(**{field: getattr(load, field) for field in load.__struct_fields__} | {"url": url})
            )
        for name, times in round_.items() if turn else ():
            found[name] += times
    return found


def report(found: dict[str, list[Times]], bases: Sequence[tuple[str, str]]) -> None:
    print(f"{'ms':14} {'TTFT best':>10} {'median':>9} {'ITL best':>10} {'median':>9} {'p90':>9}")
    medians: dict[str, tuple[float, float]] = {}
    for name, times in found.items():
        ttfts, gaps = [ttft for ttft, _ in times], [gap for _, itl in times for gap in itl]
        ttft, itl = spread(ttfts), spread(gaps)
        if ttft is None or itl is None:
            continue
        medians[name] = ttft.median, itl.median
        cells = (f"{min(ttfts) * 1e3:10.1f} {ttft.median * 1e3:9.1f}", f"{min(gaps) * 1e3:10.1f}")
        print(f"{name:14} {cells[0]} {cells[1]} {itl.median * 1e3:9.1f} {itl.p90 * 1e3:9.1f}")
    for ours, base in bases:
        ratios = [one / other for one, other in zip(medians[ours], medians[base], strict=True)]
        print(f"{ours} / {base}: TTFT {ratios[0]:.2f}, ITL {ratios[1]:.2f} (medians)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--requests", type=int, default=5)
    parser.add_argument("--threads", type=int, help="CPU threads of each; by default as each chooses itself")
    parser.add_argument("--model", help="a model folder; by default a random one is made")
    options = parser.parse_args()
    flags = ["--kv-memory", "256MiB"]
    if options.threads:
        torch.set_num_threads(options.threads)
        flags += ["--threads", options.threads]
    print(heading(), flush=True)
    with ExitStack() as stack:
        folder = options.model or make_model(stack.enter_context(tempfile.TemporaryDirectory()))
        urls = {
            "aggregated": stack.enter_context(served(folder, "--prefill", 0, *flags)),
            "PD": stack.enter_context(served(folder, *flags)),
        }
        found = compare(folder, options, urls)
    report(found, (("aggregated", "transformers"), ("PD", "aggregated")))


if __name__ == "__main__":
    main()
