"""How long it takes to start: the first answered request of `tandem serve`, `tandem --help`, `import tandem.cli`.

python bench/startup.py [--repeats 3] [--model FOLDER]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from server import DEMO_MODEL, heading, served, tandem_command

from tandem.client import Client

WORDS = {
    "help": "tandem --help",
    "import": "import tandem.cli, interpreter included",
    "bare": "python -c pass, for comparison",
}


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def command(arguments: Sequence[str]) -> Callable[[], object]:
    return lambda: subprocess.run(arguments, stdout=subprocess.DEVNULL, check=True)


def first_answer(arguments: Sequence[str]) -> tuple[float, float]:
    """Seconds from the command to "ready", and to the end of the first answer."""

    async def ask(url: str) -> None:
        async with Client(url) as client:
            await client.complete("/v1/completions", {"prompt": "Hello", "max_tokens": 4, "temperature": 0})

    begin = time.perf_counter()
    with served(*arguments) as url:
        ready = time.perf_counter() - begin
        asyncio.run(ask(url))
        return ready, time.perf_counter() - begin


def row(name: str, values: Sequence[float]) -> str:
    return f"{name:44} {statistics.median(values):8.2f} {min(values):8.2f} {max(values):8.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default=str(DEMO_MODEL))
    options = parser.parse_args()
    print(heading())
    print(f"{'seconds':44} {'median':>8} {'best':>8} {'worst':>8}")
    commands = {
        "help": tandem_command("--help"),
        "import": [sys.executable, "-c", "import tandem.cli"],
        "bare": [sys.executable, "-c", "pass"],
    }
    for name, arguments in commands.items():
        print(row(WORDS[name], [seconds(command(arguments)) for _ in range(2 * options.repeats + 1)]), flush=True)
    for words, flags in (("1 prefill + 1 decode", []), ("aggregated", ["--prefill", "0"])):
        times = [first_answer([options.model, *flags]) for _ in range(options.repeats)]
        print(row(f"tandem serve, {words}: ready", [ready for ready, _ in times]))
        print(row(f"tandem serve, {words}: first answer", [answered for _, answered in times]), flush=True)


if __name__ == "__main__":
    main()
