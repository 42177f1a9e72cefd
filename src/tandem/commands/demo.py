"""`tandem demo`: the bundled model behind one prefill and one decode engine, asked questions with one right answer."""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console as RichConsole
from rich.markup import escape
from rich.table import Table

from tandem.client import Client, TimedCompletion
from tandem.commands.supervise import StopSignal, supervised
from tandem.config import CacheSection, ClusterConfig, LogLevel, RunSection
from tandem.console import Console
from tandem.demo_questions import Question, long_questions, questions
from tandem.errors import ConfigError, RequestError
from tandem.local_cluster import start_cluster
from tandem.model_folder import ModelFolder
from tandem.processes import ChildProcesses

MODEL = Path(__file__).parent.parent / "demo_model"
NAME = "tandem-demo"
SEED = 0
PLAIN_WIDTH = 130
NUMBERS_WIDTH = 62  # of the columns that are not text
INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Result:
    """A question and its completion, or why there is none."""

    question: Question
    completion: TimedCompletion | None = None
    error: str | None = None

    @property
    def is_right(self) -> bool:
        return self.completion is not None and self.completion.text == self.question.answer

    @property
    def is_disaggregated(self) -> bool:
        details = self.completion.details if self.completion is not None else None
        return details is not None and details.disaggregated

    @property
    def complaint(self) -> str | None:
        """Why the result is not as it should be; None if it is."""
        if self.completion is None:
            return f"got no answer: {self.error}"
        if not self.is_right:
            return f"should be {self.question.answer!r}, not {self.completion.text!r}"
        if not self.is_disaggregated:
            details = self.completion.details
            return f"was not disaggregated: {details.reason if details else 'the answer does not say how it was made'}"
        return None


def run_demo(count: int, connector: str | None, log_level: LogLevel) -> int:
    """Return 0 if all answers are right and all were disaggregated."""
    if count < 1:
        raise ConfigError(f"--questions must be 1 or more; got {count}")

    def body(children: ChildProcesses, console: Console) -> int:
        begin = time.perf_counter()
        try:
            url = _serve(children, console, connector, log_level)
            ready = time.perf_counter()
            first, second = sample(count)
            results = asyncio.run(_ask_all(url, first, second))
            children.check()
            _show(results, len(first), ready - begin, time.perf_counter() - ready)
        except StopSignal:
            console.echo("stopping ...")
            return INTERRUPTED
        return 0 if all(result.complaint is None for result in results) else 1

    return supervised(body)


def sample(count: int) -> tuple[list[Question], list[Question]]:
    """Return questions to ask one at a time, and others to ask at once; a third of each has a long prompt."""
    long = iter(long_questions(count // 3, SEED))
    short = iter(questions(count - count // 3, SEED))
    mixed = [next(long) if index % 3 == 2 else next(short) for index in range(count)]
    half = (count + 1) // 2
    return mixed[:half], mixed[half:]


def _serve(children: ChildProcesses, console: Console, connector: str | None, log_level: LogLevel) -> str:
    """Start everything on free ports of loopback; return the router's URL."""
    children.warm()
    config = ClusterConfig(
        port=0,
        connector=connector,
        cache=CacheSection(kv_memory=64 << 20),
        run=RunSection(threads=1, log_level=log_level),
    )
    with console:
        cluster = start_cluster(children, config, ModelFolder(str(MODEL), NAME), console)
    cluster.close_listeners()
    return f"http://{cluster.router.http}"


async def _ask_all(url: str, first: list[Question], second: list[Question]) -> list[Result]:
    async with Client(url) as client:
        results = [await _ask(client, question) for question in first]
        return results + await asyncio.gather(*(_ask(client, question) for question in second))


async def _ask(client: Client, question: Question) -> Result:
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": question.prompt}],
        "temperature": 0,
        "max_tokens": len(question.answer.encode()) + 8,
        "stream_options": {"include_usage": True},
    }
    try:
        return Result(question, await client.complete("/v1/chat/completions", body))
    except RequestError as error:
        return Result(question, error=str(error))


def _show(results: list[Result], alone: int, start_seconds: float, ask_seconds: float) -> None:
    console = RichConsole(highlight=False) if sys.stdout.isatty() else RichConsole(highlight=False, width=PLAIN_WIDTH)
    console.print(_table(results, alone, console.width))
    for result in results:
        if result.complaint is not None:
            console.print(
                f"[red]wrong:[/red] {escape(result.question.prompt[:60])} {escape(result.complaint)}", soft_wrap=True
            )
    console.print(_summary(results), soft_wrap=True)
    console.print(f"ready after {start_seconds:.1f} s, questions answered in {ask_seconds:.1f} s")


def _table(results: list[Result], alone: int, width: int) -> Table:
    together = len(results) - alone
    title = f"{alone} asked one at a time" + (f", then {together} at once" if together else "")
    table = Table(title=f"{title}; TTFT and ITL in ms", box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for name in ("question", "answer"):
        table.add_column(
            name, no_wrap=True, overflow="ellipsis", max_width=min(50, max(8, (width - NUMBERS_WIDTH) // 2))
        )
    table.add_column("right", no_wrap=True)
    for name in ("TTFT", "ITL", "blocks", "kB", "descr.", "GB/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("PD", no_wrap=True, min_width=3)
    for index, result in enumerate(results):
        table.add_row(*_row(result), end_section=index == alone - 1)
    return table


def _row(result: Result) -> list[str]:
    completion, prompt = result.completion, escape(result.question.prompt)
    if completion is None:
        return [prompt, escape(result.error or ""), "[red]no[/red]"]
    times = [f"{completion.ttft * 1e3:.0f}", f"{completion.itl * 1e3:.1f}"]
    cells = [prompt, escape(completion.text), _yes_no(result.is_right), *times]
    details = completion.details
    if details is None:
        return cells
    moved = [str(details.blocks), f"{details.bytes / 1e3:.0f}", str(details.descriptors)]
    return [*cells, *moved, _rate(details.bytes, details.transfer_time), _yes_no(result.is_disaggregated)]


def _yes_no(fact: bool) -> str:
    return "[green]yes[/green]" if fact else "[red]no[/red]"


def _rate(moved: int, seconds: float) -> str:
    return f"{moved / seconds / 1e9:.2f}" if seconds > 0 else "-"


def _summary(results: list[Result]) -> str:
    right, disaggregated = (sum(one.is_right for one in results), sum(one.is_disaggregated for one in results))
    color = "green" if right == disaggregated == len(results) else "red"
    text = f"[{color}]{right} of {len(results)} answers right, {disaggregated} disaggregated[/{color}]"
    completions = [result.completion for result in results if result.completion is not None]
    details = [completion.details for completion in completions if completion.details is not None]
    if not details:
        return text
    size, blocks = sum(one.bytes for one in details), sum(one.blocks for one in details)
    descriptors, seconds = sum(one.descriptors for one in details), sum(one.transfer_time for one in details)
    transports = ", ".join(sorted({one.transport for one in details if one.transport})) or "nothing"
    gaps = [gap for completion in completions for gap in completion.gaps]
    return (
        f"{text}; {size / 1e6:.1f} MB of KV in {blocks} blocks moved by {transports} with {descriptors} descriptors"
        f" at {_rate(size, seconds)} GB/s\n"
        f"medians: TTFT {statistics.median(completion.ttft for completion in completions) * 1e3:.0f} ms,"
        f" ITL {statistics.median(gaps or [0.0]) * 1e3:.1f} ms"
    )
