"""Latency of the bundled model, one request at a time: prefill and decode apart, and aggregated, in turn.

python bench/latency.py [--input-len 512] [--output-len 64] [--requests 20] [--threads N] [--connector tcp]

The hand-off goes from the news of the first token to the end of the decode engine's first step; the transfer of what
the prompt's last chunk added lies in it. "beyond transfer" is the hand-off without the time that reads took.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from contextlib import ExitStack

from server import DEMO_MODEL, heading, served

from tandem.commands.bench import measure
from tandem.commands.bench_report import Record, percentiles
from tandem.commands.workload import Workload


async def alternate(urls: dict[str, str], options: argparse.Namespace) -> dict[str, list[Record]]:
    """Rounds of a few requests each, so that all meet the same disturbances."""
    found: dict[str, list[Record]] = {name: [] for name in urls}
    for turn in range(options.requests):
        for name, url in urls.items():
            workload = Workload(
                url=url,
                input_len=options.input_len,
                output_len=options.output_len,
                num_prompts=1,
                concurrency=1,
                seed=turn,
                warmup=2 if turn == 0 else 0,
            )
            found[name] += (await measure(workload)).records
    return found


def report(name: str, records: Sequence[Record]) -> None:
    good = [record for record in records if record.error is None]
    for record in records:
        if record.error is not None:
            print(f"{name}: {record.error}")
    rows = {"TTFT": [r.ttft for r in good], "ITL": [gap for r in good for gap in r.itl]}
    details = [record.tandem for record in good if record.tandem is not None]
    rows["prefill"] = [one.prefill_time for one in details]
    moved = [one for one in details if one.disaggregated]
    if moved:
        rows["transfer"] = [one.transfer_time for one in moved]
        rows["hand-off"] = [one.handoff_time for one in moved]
        rows["hand-off beyond transfer"] = [one.handoff_time - one.transfer_time for one in moved]
    for words, values in rows.items():
        one = percentiles(values)
        if one is not None:
            cells = " ".join(f"{value * 1e3:9.2f}" for value in (min(values), one.median, one.mean, one.p90))
            print(f"{name:12} {words:26} {cells}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--threads", type=int, help="CPU threads of each engine")
    parser.add_argument("--connector", help="nixl or tcp")
    parser.add_argument("--model", default=str(DEMO_MODEL))
    options = parser.parse_args()
    flags = ["--kv-memory", "256MiB"]
    flags += ["--threads", options.threads] if options.threads else []
    flags += ["--connector", options.connector] if options.connector else []
    print(heading())
    with ExitStack() as stack:
        urls = {
            "PD": stack.enter_context(served(options.model, *flags)),
            "aggregated": stack.enter_context(served(options.model, "--prefill", 0, *flags)),
        }
        found = asyncio.run(alternate(urls, options))
    print(f"{'ms':39} {'best':>9} {'median':>9} {'mean':>9} {'p90':>9}")
    for name, records in found.items():
        report(name, records)


if __name__ == "__main__":
    main()
