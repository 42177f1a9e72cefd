"""`tandem bench`: sends a load to a server with an OpenAI API and reports what it measured."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from tandem.client import Client
from tandem.commands.bench_report import Percentiles, Record, ServingSummary, Summary, summary
from tandem.commands.workload import Workload
from tandem.errors import ConfigError, RequestError

PATH = "/v1/completions"
PLAIN_WIDTH = 110
TIME_NAMES = {
    "queue_time": "queue",
    "prefill_time": "prefill",
    "transfer_time": "transfer",
    "handoff_time": "hand-off",
}


@dataclass(frozen=True, slots=True)
class Measured:
    records: list[Record]
    duration: float


def run_bench(workload: Workload, api_key: str | None, json_file: Path | None) -> int:
    """Send the load, show the summary, write `json_file`; return 1 if any request failed."""
    if json_file is not None and not json_file.resolve().parent.is_dir():
        raise ConfigError(f"--json {json_file}: there is no folder {json_file.resolve().parent}")
    progress = Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    with progress:
        task = progress.add_task("requests", total=workload.num_prompts)
        measured = _fast_loop(measure(workload, api_key, lambda: progress.advance(task)))
    found = summary(measured.records, measured.duration, workload.slo)
    show(found)
    if json_file is not None:
        load = asdict(workload)
        load["goal"] = load.pop("slo")
        whole = {"load": load, "summary": found, "requests": measured.records}
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(whole), indent=1))
    return 1 if found.failed else 0


async def measure(workload: Workload, api_key: str | None = None, done: Callable[[], None] = lambda: None) -> Measured:
    """Send the load and return what was measured. Raises RequestError if a warm-up request fails.

    Args:
        done: called after each measured request.
    """
    prompts = workload.prompts()
    async with Client(workload.url, api_key=api_key) as client:
        model = workload.model or await client.model()
        for prompt in prompts[: workload.warmup]:
            await client.complete(PATH, _body(model, prompt, workload.output_len))
        slots = asyncio.Semaphore(workload.concurrency or workload.num_prompts)
        begin = time.perf_counter()

        async def one(prompt: list[int], arrival: float) -> Record:
            await asyncio.sleep(begin + arrival - time.perf_counter())
            async with slots:
                record = await _record(client, _body(model, prompt, workload.output_len), len(prompt), begin)
            done()
            return record

        timed = zip(prompts[workload.warmup :], workload.arrivals(), strict=True)
        records = await asyncio.gather(*(one(prompt, arrival) for prompt, arrival in timed))
    return Measured(records, max(record.ended for record in records))


async def _record(client: Client, body: dict[str, Any], prompt_tokens: int, begin: float) -> Record:
    sent = time.perf_counter()
    try:
        completion = await client.complete(PATH, body)
    except RequestError as error:
        now = time.perf_counter()
        return Record(prompt_tokens, 0, sent - begin, now - begin, now - sent, [], error=str(error))
    return Record(
        prompt_tokens,
        completion.output_tokens,
        completion.sent - begin,
        completion.ended - begin,
        completion.ttft,
        completion.gaps,
        completion.finish_reason,
        tandem=completion.details,
    )


def _body(model: str, prompt: list[int], output_len: int) -> dict[str, Any]:
    """Ask for token ids too, so that every token makes an event, also one that is not yet a whole character."""
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
    """Run on uvloop where it is installed: the client shares the machine with what it measures."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)


def show(found: Summary) -> None:
    """Print the summary on stdout."""
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
    if found.serving is not None:
        _add_serving_rows(table, found.serving)
    if table.row_count:
        console.print(table)
    if found.serving is not None:
        console.print(_serving_text(found.serving), soft_wrap=True)


def _counts(found: Summary) -> str:
    text = (
        f"{found.requests - found.failed} of {found.requests} requests in {found.duration:.2f} s:"
        f" {found.requests_per_second:.2f} requests/s, {found.output_tokens_per_second:.1f} output tok/s"
        f" ({found.prompt_tokens} tokens in, {found.output_tokens} out)"
    )
    return text if found.goodput is None else f"{text}; goodput {found.goodput:.2f} requests/s"


def _add_serving_rows(table: Table, serving: ServingSummary) -> None:
    table.add_section()
    for name, one in serving.times.items():
        table.add_row(f"{TIME_NAMES[name]} ms", *_cells(one, 1e3))
    table.add_section()
    for name, one in serving.amounts.items():
        scale, unit = (1e-3, "kB") if name == "bytes" else (1.0, name)
        table.add_row(f"{unit} moved" if name == "bytes" else unit, *_cells(one, scale))


def _cells(one: Percentiles, scale: float) -> Sequence[str]:
    return [f"{value * scale:,.1f}" for value in (one.mean, one.median, one.p90, one.p99)]


def _serving_text(serving: ServingSummary) -> str:
    by = ", ".join(f"{count} by {name}" for name, count in serving.transports.items())
    text = (
        f"{serving.disaggregated} of {serving.requests} disaggregated ({serving.disaggregated / serving.requests:.0%})"
    )
    lines = [f"{text}{': ' + by if by else ''}; {serving.total_bytes / 1e6:.1f} MB of KV moved"]
    if serving.recomputations:
        lines.append(f"KV computed again {serving.recomputations} times")
    lines += [f"{count} not disaggregated: {escape(reason)}" for reason, count in serving.reasons.items()]
    return "\n".join(lines)
