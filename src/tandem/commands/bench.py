"""`tandem bench`: load on a server with an OpenAI API, and what came of it."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from tandem.client import Client
from tandem.commands.bench_report import Hops, Percentiles, Record, Slo, Summary, summary
from tandem.errors import ConfigError, RequestError

PATH = "/v1/completions"
PLAIN_WIDTH = 110
STAGE_NAMES = {
    "queue_time": "queue",
    "prefill_time": "prefill",
    "transfer_time": "transfer",
    "handoff_time": "hand-off",
}


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """What is sent where.

    Attributes:
        request_rate: requests a second, in the mean of a Poisson process; inf for all at once.
        concurrency: most requests under way; None for no limit. A request that waits for others has not been sent yet.
        vocab_size: prompts are made of token ids below it.
        warmup: requests before the measured ones, one at a time.
    """

    url: str
    input_len: int
    output_len: int
    num_prompts: int
    request_rate: float = math.inf
    concurrency: int | None = None
    model: str | None = None
    seed: int = 0
    warmup: int = 1
    vocab_size: int = 256
    goal: Slo = Slo()

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len", "num_prompts", "request_rate", "concurrency", "vocab_size"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"--{name.replace('_', '-')} must be greater than 0; got {value}")
        if self.warmup < 0:
            raise ConfigError(f"--warmup must be 0 or more; got {self.warmup}")

    def prompts(self) -> list[list[int]]:
        """Random token ids, `warmup + num_prompts` times `input_len`; the same for the same seed."""
        shape = (self.warmup + self.num_prompts, self.input_len)
        drawn: list[list[int]] = np.random.default_rng(self.seed).integers(self.vocab_size, size=shape).tolist()
        return drawn

    def arrivals(self) -> list[float]:
        """Seconds from the start, for each measured request; the first is 0."""
        if math.isinf(self.request_rate):
            return [0.0] * self.num_prompts
        gaps = np.random.default_rng([self.seed, 1]).exponential(1 / self.request_rate, self.num_prompts - 1)
        return [0.0, *np.cumsum(gaps).tolist()]


@dataclass(frozen=True, slots=True)
class Measured:
    records: list[Record]
    duration: float


def run(load: Workload, api_key: str | None, json_file: Path | None) -> int:
    """Send the load, show the summary, write `json_file`; 1 if any request failed."""
    if json_file is not None and not json_file.resolve().parent.is_dir():
        raise ConfigError(f"--json {json_file}: there is no folder {json_file.resolve().parent}")
    progress = Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    with progress:
        task = progress.add_task("requests", total=load.num_prompts)
        measured = _fast_loop(measure(load, api_key, lambda: progress.advance(task)))
    found = summary(measured.records, measured.duration, load.goal)
    show(found)
    if json_file is not None:
        whole = {"load": load, "summary": found, "requests": measured.records}
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(whole), indent=1))
    return 1 if found.failed else 0


async def measure(load: Workload, api_key: str | None = None, done: Callable[[], None] = lambda: None) -> Measured:
    """Send the load. `done` is called after each measured request. Raises RequestError if warming up fails."""
    prompts = load.prompts()
    async with Client(load.url, api_key=api_key) as client:
        model = load.model or await client.model()
        for prompt in prompts[: load.warmup]:
            await client.ask(PATH, _body(model, prompt, load.output_len))
        gate = asyncio.Semaphore(load.concurrency or load.num_prompts)
        begin = time.perf_counter()

        async def one(prompt: list[int], arrival: float) -> Record:
            await asyncio.sleep(begin + arrival - time.perf_counter())
            async with gate:
                record = await _record(client, _body(model, prompt, load.output_len), len(prompt), begin)
            done()
            return record

        timed = zip(prompts[load.warmup :], load.arrivals(), strict=True)
        records = await asyncio.gather(*(one(prompt, arrival) for prompt, arrival in timed))
    return Measured(records, max(record.ended for record in records))


async def _record(client: Client, body: dict[str, Any], prompt_tokens: int, begin: float) -> Record:
    sent = time.perf_counter()
    try:
        answer = await client.ask(PATH, body)
    except RequestError as error:
        now = time.perf_counter()
        return Record(prompt_tokens, 0, sent - begin, now - begin, now - sent, [], error=str(error))
    return Record(
        prompt_tokens,
        answer.output_tokens,
        answer.sent - begin,
        answer.ended - begin,
        answer.ttft,
        answer.gaps,
        answer.finish_reason,
        tandem=answer.how,
    )


def _body(model: str, prompt: list[int], output_len: int) -> dict[str, Any]:
    """Token ids are asked for so that every token makes an event, also one that is not yet a whole character."""
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_len,
        "ignore_eos": True,
        "temperature": 0,
        "return_token_ids": True,
        "stream_options": {"include_usage": True},
    }


def _fast_loop(work: Coroutine[Any, Any, Measured]) -> Measured:
    """uvloop where there is one: the client shares the machine with what it measures."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)


def show(found: Summary) -> None:
    """On stdout."""
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=PLAIN_WIDTH)
    console.print(_counts(found), soft_wrap=True)
    for error, count in found.errors.items():
        console.print(f"[red]{count} failed:[/red] {escape(error)}", soft_wrap=True)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("", "mean", "median", "p90", "p99"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, one in (("TTFT", found.ttft), ("ITL", found.itl), ("TPOT", found.tpot), ("e2e", found.e2e)):
        if one is not None:
            table.add_row(f"{name} ms", *_cells(one, 1e3))
    if found.hops is not None:
        _add_hops(table, found.hops)
    if table.row_count:
        console.print(table)
    if found.hops is not None:
        console.print(_shares(found.hops), soft_wrap=True)


def _counts(found: Summary) -> str:
    text = (
        f"{found.requests - found.failed} of {found.requests} requests in {found.duration:.2f} s:"
        f" {found.requests_per_second:.2f} requests/s, {found.output_tokens_per_second:.1f} output tok/s"
        f" ({found.prompt_tokens} tokens in, {found.output_tokens} out)"
    )
    return text if found.goodput is None else f"{text}; goodput {found.goodput:.2f} requests/s"


def _add_hops(table: Table, hops: Hops) -> None:
    table.add_section()
    for name, one in hops.times.items():
        table.add_row(f"{STAGE_NAMES[name]} ms", *_cells(one, 1e3))
    table.add_section()
    for name, one in hops.amounts.items():
        scale, unit = (1e-3, "kB") if name == "bytes" else (1.0, name)
        table.add_row(f"{unit} moved" if name == "bytes" else unit, *_cells(one, scale))


def _cells(one: Percentiles, scale: float) -> Sequence[str]:
    return [f"{value * scale:,.1f}" for value in (one.mean, one.median, one.p90, one.p99)]


def _shares(hops: Hops) -> str:
    by = ", ".join(f"{count} by {name}" for name, count in hops.transports.items())
    text = f"{hops.disaggregated} of {hops.requests} disaggregated ({hops.disaggregated / hops.requests:.0%})"
    lines = [f"{text}{': ' + by if by else ''}; {hops.total_bytes / 1e6:.1f} MB of KV moved"]
    if hops.recomputations:
        lines.append(f"KV computed again {hops.recomputations} times")
    lines += [f"{count} not disaggregated: {escape(reason)}" for reason, count in hops.reasons.items()]
    return "\n".join(lines)
