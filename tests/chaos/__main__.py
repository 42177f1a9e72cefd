"""`python -m tests.chaos`: start a cluster, disturb it round after round, and judge every answer."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.chaos import report
from tests.chaos.cluster import ENGINES, Cluster, Settings
from tests.chaos.faults import deck, fault_of, pipeline_of
from tests.chaos.load import Book, questions
from tests.chaos.processes import can_cut
from tests.chaos.rounds import Round, RoundRunner
from tests.chaos.support import FAMILIES, Reference, run_tandem

START_SECONDS = 90.0
TAIL_BYTES = 200_000


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--connector", choices=["nixl", "tcp", "both"], default="nixl", help="both: half of them each")
    parser.add_argument("--key", action="store_true", help="with a cluster key")
    parser.add_argument(
        "--pipeline",
        choices=["none", *(name for name, shape in ENGINES.items() if shape.ranks > 1)],
        help="this engine has pipeline stages; by default the seed says which one, if any",
    )
    parser.add_argument("--only", type=int, metavar="ROUND", help="this round alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all records")
    parser.add_argument("--folder", type=Path, help="for the logs; by default one that is kept only after a failure")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--questions", type=int, default=150, help="with known answers")
    parser.add_argument("--check-every", type=int, default=5, metavar="ROUNDS", help="pause the load, look for leaks")
    parser.add_argument("--longest-pause", type=float, default=20.0, metavar="SECONDS", help="of a stopped process")
    parser.add_argument("--transformers", type=int, default=4, metavar="N", help="answers to check against it")
    parser.add_argument("--quick", action="store_true", help="mostly faults that need no new process")
    parser.add_argument("--log-level", default="info", help="of the cluster")
    return parser.parse_args()


class Harness:
    """All rounds of one run."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.rounds: list[Round] = []
        self.problems: list[str] = []
        self._cluster: Cluster | None = None

    def kill(self) -> None:
        """Whatever is still there, after an end in haste."""
        if self._cluster is not None:
            self._cluster.kill()

    async def run(self) -> None:
        """Raises AssertionError or RuntimeError if the cluster does not work undisturbed or cannot be mended."""
        options = self.options
        cuts = await can_cut()
        if not cuts:
            say("connections are not cut: `ss -K` does not work here (it needs root and a kernel that has it)")
        self._deck = deck(options.seed, options.quick, cuts)
        numbers = list(range(options.rounds)) if options.only is None else [options.only]
        half = (len(numbers) + 1) // 2
        parts = {"nixl": numbers[:half], "tcp": numbers[half:]} if options.connector == "both" else {}
        for connector, part in (parts or {options.connector: numbers}).items():
            if part:
                await self._rounds(connector, part)

    async def _rounds(self, connector: str, numbers: list[int]) -> None:
        options, work = self.options, self.folder / connector
        work.mkdir(parents=True, exist_ok=True)
        if options.key:
            assert run_tandem("keygen", work / "cluster.key").code == 0
        book = Book(questions(options.seed, options.questions))
        started = time.monotonic()
        model = FAMILIES["qwen3"].write(work / "model")
        pipeline = options.pipeline or pipeline_of(options.seed, connector) or "none"
        settings = Settings(
            model,
            work,
            connector,
            key=options.key,
            pipeline=pipeline if pipeline in ENGINES else None,
            log_level=options.log_level,
        )
        self._cluster = Cluster(settings)
        async with self._cluster as cluster:
            if (missing := await cluster.wait_whole(START_SECONDS)) is not None:
                raise RuntimeError(f"the cluster did not start: {missing}; its logs are in {cluster.logs}")
            whole = time.monotonic()
            await book.fill(cluster.http, cluster.url, settings.request_timeout)
            say(
                f"{connector}, pipeline {pipeline}: whole after {whole - started:.1f} s, {len(book.questions)} right "
                f"answers after {time.monotonic() - whole:.1f} s more"
            )
            self.problems += [f"{connector}: {problem}" for problem in book.problems]
            if options.transformers and not self.rounds:
                book.check_against(Reference(model), options.transformers)
            for index, number in enumerate(numbers):
                check = (index + 1) % options.check_every == 0 or number == numbers[-1]
                await self._one(cluster, book, connector, number, check)
        if left := sorted(path.name for path in cluster.temporary.iterdir()):
            say(f"{connector}: {len(left)} temporary files were left: {', '.join(left[:6])} ...")

    async def _one(self, cluster: Cluster, book: Book, connector: str, number: int, check: bool) -> None:
        options = self.options
        fault = fault_of(options.seed, number, self._deck, options.longest_pause)
        round_ = Round(number, connector, fault)
        self.rounds.append(round_)
        try:
            await RoundRunner(cluster, book, options.seed, options.clients, round_).run(check)
        finally:
            if round_.failures() or round_.problems or sys.exception() is not None:
                keep_tails(cluster, self.folder / f"round-{connector}-{number}")
        bad = ", ".join([*(record.verdict for record in round_.failures()), *round_.problems])
        errors = sum(record.verdict == "error" for record in round_.records)
        pause = f" {fault.seconds} s" if fault.kind == "stop" else ""
        good = "-" if round_.first_good is None else f"{round_.first_good:.1f}"
        say(
            f"{number:4} {fault.name}{pause}, {fault.moment}: {round_.victim}; {len(round_.records)} requests, "
            f"{errors} errors; first good answer {good} s, whole {round_.whole or 0.0:.1f} s, round "
            f"{round_.seconds:.1f} s"
            + (f"; {', '.join(round_.endings)}" if round_.endings else "")
            + (f"; FAILED: {bad[:300]}" if bad else "")
        )


def keep_tails(cluster: Cluster, folder: Path) -> None:
    """Keep the last lines of all logs."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, command in cluster.commands.items():
        if command.log.exists():
            raw = command.log.read_bytes()
            (folder / f"{name}.log").write_bytes(raw[-TAIL_BYTES:])


def replay(options: argparse.Namespace) -> str:
    """Return the command that repeats a round, less its number and connector."""
    valued = [
        f"--{name.replace('_', '-')} {getattr(options, name)}" for name in ("clients", "questions", "longest_pause")
    ]
    if options.pipeline is not None:
        valued.append(f"--pipeline {options.pipeline}")
    flags = [f"--{name}" for name in ("key", "quick") if getattr(options, name)]
    return " ".join(["python -m tests.chaos --seed", str(options.seed), *valued, *flags])


def say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    options = arguments()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    harness = Harness(options, folder)

    async def run() -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        await harness.run()

    ended_well, started = False, time.monotonic()
    try:
        asyncio.run(run())
        ended_well = True
    except (KeyboardInterrupt, asyncio.CancelledError):
        say("stopped")
    except Exception:
        traceback.print_exc()
    finally:
        harness.kill()
    say("\n" + report.table(harness.rounds))
    say(f"\n{time.monotonic() - started:.0f} s. Typed errors:\n{report.typed_errors(harness.rounds) or 'none'}")
    say(f"\nUsed, where a command ran for long:\n{report.growth(harness.rounds) or 'none did'}")
    if options.json is not None:
        settings = {name: str(value) for name, value in vars(options).items()} | {"command": shlex.join(sys.argv)}
        report.save(options.json, settings, harness.rounds)
    failed = report.has_failed(harness.rounds) or bool(harness.problems)
    if failed:
        say(f"\nFailures; logs in {folder}")
        say("\n".join([*harness.problems, report.failures(harness.rounds, replay(options))]))
    if ended_well and not failed and options.folder is None:
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)
    return 0 if ended_well and not failed else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
