"""`python -m tests.simulator`: run many schedules, replay one, or break the code and see whether that is noticed."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence

from tests.simulator.mutations import MASKED, MUTATIONS, broken
from tests.simulator.plan import Assumptions
from tests.simulator.simulation import Result, run_schedule

COLLECT_EVERY = 200
"""Schedules between two collections of garbage, which is switched off while one runs."""
MUTATION_SCHEDULES = 2000


def main() -> int:
    options = _options()
    assumptions = Assumptions(options.skew, options.diverge, options.tight)
    if options.replay is not None:
        result = run_schedule(options.replay, assumptions, verbose=True)
        print(*result.trace, *result.failures, sep="\n")
        return bool(result.failures)
    if options.mutations is not None:
        names = [name for name in (*MUTATIONS, *MASKED) if all(word in name for word in options.mutations)]
        return _try_mutations(names, range(options.seed, options.seed + MUTATION_SCHEDULES), assumptions)
    return _run(range(options.seed, options.seed + options.schedules), assumptions, verbose=options.verbose)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.simulator", description=__doc__)
    parser.add_argument("--schedules", type=int, default=1000, help="how many to run")
    parser.add_argument("--seed", type=int, default=0, help="of the first one; each that follows has the next")
    parser.add_argument("--replay", type=int, metavar="SEED", help="run this one and show everything that happens")
    parser.add_argument("--verbose", action="store_true", help="show the trace of each schedule that fails")
    parser.add_argument("--mutations", nargs="*", metavar="WORD", help="break the code in each way with this word")
    parser.add_argument("--skew", type=float, default=Assumptions().skew, help="most that a clock is fast or slow")
    parser.add_argument("--diverge", action="store_true", help="engines choose other tokens after the same ones")
    parser.add_argument("--tight", action="store_true", help="memory is short also with two routers")
    return parser.parse_args()


def _run(seeds: range, assumptions: Assumptions, *, verbose: bool) -> int:
    began = time.perf_counter()
    ends: Counter[str] = Counter()
    events, virtual, failed = 0, 0.0, []
    for result in _results(seeds, assumptions):
        ends.update(result.ends)
        events += result.events
        virtual += result.seconds
        if result.failures:
            failed.append(result.seed)
            print(f"seed {result.seed}: {result.failures[0]}", flush=True)
            if verbose:
                print(*run_schedule(result.seed, assumptions, verbose=True).trace, sep="\n", flush=True)
    seconds = time.perf_counter() - began
    print(f"{len(seeds)} schedules in {seconds:.1f} s: {len(seeds) / seconds:.1f} a second, {events} events,", end=" ")
    print(f"{virtual:.0f} s of virtual time, {sum(ends.values())} requests")
    print("  " + ", ".join(f"{count} {how}" for how, count in ends.most_common()))
    print(f"  {len(failed)} failed{': ' + ' '.join(map(str, failed)) if failed else ''}")
    return bool(failed)


def _results(seeds: range, assumptions: Assumptions) -> Iterable[Result]:
    for seed in seeds:
        yield run_schedule(seed, assumptions)
        if seed % COLLECT_EVERY == 0:
            gc.collect()


def _try_mutations(names: Sequence[str], seeds: range, assumptions: Assumptions) -> int:
    unnoticed = 0
    for name in names:
        with broken(name):
            result = next((result for result in _results(seeds, assumptions) if result.failures), None)
        unnoticed += result is None and name in MUTATIONS
        after = f"{result.seed - seeds.start + 1:4}  {result.failures[0][:150]}" if result else "never"
        print(f"{name:60} {after}", flush=True)
    return bool(unnoticed)


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":  # the order of sets of strings is part of what a seed decides
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.simulator", *sys.argv[1:]])
    sys.exit(main())
