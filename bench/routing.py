"""Where requests go that share the beginning of their prompts: kv-aware routing and least-load, in turn.

python bench/routing.py [--prefill 2] [--decode 2] [--model FOLDER] [--turns 5] [--clients 4]

Two workloads: conversations, each turn with all that was said before; and questions under a few long system prompts.
Prompts are random tokens. "cached": share of the prompts' tokens that a prefill engine had and did not compute again.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

from server import heading, served

Ask = Callable[[list[int]], list[int]]
"""Sends a prompt; returns the answer's tokens."""
VOCAB = 4096
SHAPE = {"hidden": 512, "layers": 8, "heads": 8, "kv-heads": 4, "head-dim": 64, "intermediate": 1536, "vocab": VOCAB}


@dataclass(slots=True)
class Client:
    url: str
    output_len: int
    ttft: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0

    def ask(self, prompt: list[int]) -> list[int]:
        body = {
            "prompt": prompt,
            "max_tokens": self.output_len,
            "ignore_eos": True,
            "temperature": 0,
            "return_token_ids": True,
        }
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            answer = json.load(response)
        self.ttft.append(answer["tandem"]["ttft"])
        self.prompt_tokens += len(prompt)
        details = answer["tandem"]
        self.cached_tokens += details["prefix_tokens"].get(details["prefill_engine"], 0)
        return list(answer["choices"][0]["token_ids"])


def text(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(3, VOCAB) for _ in range(length)]


def conversations(ask: Ask, seed: int, turns: int) -> None:
    """Hold one conversation: a first message of 512 tokens, then 128 in each turn."""
    rng = random.Random(seed)
    said = text(rng, 512)
    for _ in range(turns):
        said += ask(said) + text(rng, 128)


def system_prompts(ask: Ask, seed: int, turns: int) -> None:
    """Ask short questions, each under one of four prompts of 1,024 tokens."""
    rng = random.Random(seed)
    prompts = [text(random.Random(f"system {number}"), 1024) for number in range(4)]
    for _ in range(turns):
        ask(rng.choice(prompts) + text(rng, 64))


WORKLOADS = {"conversations": conversations, "system prompts": system_prompts}


def measure(url: str, name: str, seed: int, options: argparse.Namespace) -> list[Client]:
    clients = [Client(url, options.output_len) for _ in range(options.clients)]
    with ThreadPoolExecutor(options.clients) as pool:
        seeds = range(options.clients * seed, options.clients * (seed + 1))
        list(pool.map(lambda client, one: WORKLOADS[name](client.ask, one, options.turns), clients, seeds))
    return clients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefill", type=int, default=2)
    parser.add_argument("--decode", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output-len", type=int, default=8)
    parser.add_argument("--kv-memory", default="64MiB", help="of each engine; small, so that not all fits everywhere")
    parser.add_argument("--model", help="folder; by default a random model of 40 M parameters")
    options = parser.parse_args()
    print(heading())
    with ExitStack() as stack:
        model = options.model or stack.enter_context(tempfile.TemporaryDirectory())
        if not options.model:
            script = Path(__file__).parent.parent / "scripts" / "make_random_model.py"
            shape = [f"--{name}={value}" for name, value in SHAPE.items()]
            subprocess.run(
                [sys.executable, script, "--out", model, "--dtype", "bfloat16", *shape],
                check=True,
                stdout=subprocess.DEVNULL,
            )
        flags = ["--prefill", options.prefill, "--decode", options.decode, "--kv-memory", options.kv_memory]
        flags += ["--threads", 1]
        urls = {how: stack.enter_context(served(model, *flags, "--routing", how)) for how in ("kv-aware", "least-load")}
        for name in WORKLOADS:
            clients = [(how, measure(urls[how], name, turn, options)) for turn in range(options.rounds) for how in urls]
            for how in urls:
                report(f"{name}, {how}", [client for found, some in clients if found == how for client in some])


def report(name: str, clients: list[Client]) -> None:
    times = [1e3 * one for client in clients for one in client.ttft]
    cached = sum(client.cached_tokens for client in clients) / sum(client.prompt_tokens for client in clients)
    p90 = quantiles(times, n=10)[-1]
    print(
        f"{name:28} {len(times):4} requests, cached {cached:4.0%}, TTFT p50 {median(times):6.1f} ms, p90 {p90:6.1f} ms"
    )


if __name__ == "__main__":
    main()
