"""How long `tandem serve` needs after kill -9 of a process of an engine: until an answer, and until all is whole again.

An answer: of a request that is sent right after the kill. Whole: every engine is there, the killed one in a new
incarnation, and every decode engine is connected to every prefill engine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import time
import urllib.error
import urllib.request
from typing import Any

from server import DEMO_MODEL, heading, served

WITHIN_SECONDS = 60.0


def fetch(url: str, body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=WITHIN_SECONDS) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{url} answers {error.code}: {error.read().decode()}") from None


def engines(url: str) -> dict[str, dict[str, Any]]:
    return {engine["engine_id"]: engine for engine in fetch(f"{url}/tandem/engines")["engines"]}


def is_whole(now: dict[str, dict[str, Any]], before: dict[str, dict[str, Any]], killed: str) -> bool:
    if now.keys() != before.keys() or any(engine["state"] != "ready" for engine in now.values()):
        return False
    if now[killed]["incarnation"] == before[killed]["incarnation"]:
        return False
    sources = {(name, engine["incarnation"]) for name, engine in now.items() if engine["role"] == "prefill"}
    for engine in now.values():
        peers = {(peer["engine_id"], peer["incarnation"]) for peer in engine["peers"] if peer["state"] == "ready"}
        if engine["role"] == "decode" and not sources <= peers:
            return False
    return True


def kill(url: str, name: str, rank: int) -> tuple[float, float]:
    """Return seconds until an answer, and until all is whole."""
    before = engines(url)
    began = time.monotonic()
    os.kill(before[name]["ranks"][rank]["pid"], signal.SIGKILL)
    model = before[name]["model"]
    fetch(f"{url}/v1/completions", {"model": model, "prompt": "The quick", "max_tokens": 8, "temperature": 0})
    answered = time.monotonic() - began
    while not is_whole(engines(url), before, name):
        if time.monotonic() - began > WITHIN_SECONDS:
            raise SystemExit(f"{name} is not back {WITHIN_SECONDS:.0f} s after its rank {rank} was killed")
        time.sleep(0.02)
    return answered, time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(DEMO_MODEL))
    parser.add_argument("--kills", type=int, default=16)
    parser.add_argument("--pause", type=float, default=8.0, help="seconds from whole to the next kill")
    parser.add_argument("--connector", default="nixl")
    options = parser.parse_args()
    print(heading())
    shape = ("--prefill", 2, "--decode", 2, "--prefill-tp", 2, "--connector", options.connector)
    with served(options.model, *shape) as url:
        victims = [
            (f"{name}, {'leader' if rank == 0 else 'other rank'}", engine["engine_id"], rank)
            for name, engine in ((engine["role"], engine) for engine in engines(url).values())
            for rank in range(len(engine["ranks"]))
        ]
        found: dict[str, list[tuple[float, float]]] = {}
        for what, name, rank in itertools.islice(itertools.cycle(victims), options.kills):
            time.sleep(options.pause)
            found.setdefault(what, []).append(kill(url, name, rank))
    found["all"] = [times for several in found.values() for times in several]
    print("| killed | times | an answer after: median, slowest | whole after: median, slowest |\n|---|---|---|---|")
    for what, several in found.items():
        answers, wholes = zip(*several, strict=True)
        print(f"| {what} | {len(several)} | {seconds(answers)} | {seconds(wholes)} |")


def seconds(values: tuple[float, ...]) -> str:
    return f"{statistics.median(values):.2f}, {max(values):.2f} s"


if __name__ == "__main__":
    main()
