"""A long run: `python -m tests.fuzz --target NAME --inputs N --seed S`; an episode that failed: `--episode E`."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from tests.fuzz.live.attack import attack
from tests.fuzz.runner import fuzz
from tests.fuzz.targets import TARGETS

LIVE = {"live": False, "live-key": True}
"""Against a real cluster; with a cluster key, or without."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--target", choices=[*TARGETS, *LIVE, "all"], default="all", help="what is fuzzed")
    parser.add_argument("--inputs", type=int, default=10_000, help="for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episode", type=int, default=0, help="the first one")
    options = parser.parse_args()
    for name in [*TARGETS, *LIVE] if options.target == "all" else [options.target]:
        started = time.monotonic()
        if name in LIVE:
            with tempfile.TemporaryDirectory() as folder:
                report: object = attack(Path(folder), options.inputs, options.seed, keyed=LIVE[name])
        else:
            report = fuzz(TARGETS[name], options.inputs, options.seed, options.episode)
        print(f"{name}: {report} in {time.monotonic() - started:.0f} s", flush=True)


main()
