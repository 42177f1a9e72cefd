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

from tandem.client import Answer, Client
from tandem.commands.console import Console
from tandem.commands.serve import ServePlan, plan_configs, start_all
from tandem.commands.supervise import Stop, supervised
from tandem.config import LogLevel, RouterConfig
from tandem.demo_questions import Question, long_questions, questions
from tandem.errors import ConfigError, RequestError
from tandem.options import ModelOptions, NetworkOptions, RunOptions
from tandem.processes import ChildProcesses

MODEL = Path(__file__).parent.parent / "demo_model"
NAME = "tandem-demo"
SEED = 0
PLAIN_WIDTH = 130
NUMBERS_WIDTH = 62  # of the columns that are not text
INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Asked:
    """A question and what came back: an answer, or why there is none."""

    question: Question
    answer: Answer | None = None
    error: str | None = None

    @property
    def is_right(self) -> bool:
        return self.answer is not None and self.answer.text == self.question.answer

    @property
    def is_disaggregated(self) -> bool:
        return self.answer is not None and self.answer.how is not None and self.answer.how.disaggregated

    @property
    def complaint(self) -> str | None:
        """What is not as it should be."""
        if self.answer is None:
            return f"got no answer: {self.error}"
        if not self.is_right:
            return f"should be {self.question.answer!r}, not {self.answer.text!r}"
        if not self.is_disaggregated:
            reason = self.answer.how.reason if self.answer.how else "the answer does not say how it was made"
            return f"was not disaggregated: {reason}"
        return None


def run(count: int, connector: str | None, log_level: LogLevel) -> int:
    """Serve, ask, show; 0 if all answers are right and all were disaggregated."""
    if count < 1:
        raise ConfigError(f"--questions must be 1 or more; got {count}")

    def body(family: ChildProcesses, console: Console) -> int:
        begin = time.perf_counter()
        try:
            url = _serve(family, console, connector, log_level)
            ready = time.perf_counter()
            first, second = sample(count)
            asked = asyncio.run(_ask_all(url, first, second))
            family.check()
            _show(asked, len(first), ready - begin, time.perf_counter() - ready)
        except Stop:
            console.echo("stopping ...")
            return INTERRUPTED
        return 0 if all(one.complaint is None for one in asked) else 1

    return supervised(body)


def sample(count: int) -> tuple[list[Question], list[Question]]:
    """Questions to ask one at a time, and then others to ask at once; a third of each has a long prompt."""
    long = iter(long_questions(count // 3, SEED))
    short = iter(questions(count - count // 3, SEED))
    mixed = [next(long) if place % 3 == 2 else next(short) for place in range(count)]
    half = (count + 1) // 2
    return mixed[:half], mixed[half:]


def _serve(family: ChildProcesses, console: Console, connector: str | None, log_level: LogLevel) -> str:
    """Start everything on free ports of loopback; returns the router's URL."""
    family.warm()
    options = ModelOptions(kv_memory="64MiB")
    run_options = RunOptions(threads=1, log_level=log_level)
    network = NetworkOptions()
    configs = plan_configs(ServePlan(), options.model(MODEL, NAME), connector, options, network, run_options)
    with console:
        router = start_all(family, console, RouterConfig(port=0, log_level=log_level), configs)
    return f"http://{router.http}"


async def _ask_all(url: str, first: list[Question], second: list[Question]) -> list[Asked]:
    async with Client(url) as client:
        asked = [await _ask(client, question) for question in first]
        return asked + await asyncio.gather(*(_ask(client, question) for question in second))


async def _ask(client: Client, question: Question) -> Asked:
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": question.prompt}],
        "temperature": 0,
        "max_tokens": len(question.answer.encode()) + 8,
        "stream_options": {"include_usage": True},
    }
    try:
        return Asked(question, await client.ask("/v1/chat/completions", body))
    except RequestError as error:
        return Asked(question, error=str(error))


def _show(asked: list[Asked], alone: int, start_seconds: float, ask_seconds: float) -> None:
    console = RichConsole(highlight=False) if sys.stdout.isatty() else RichConsole(highlight=False, width=PLAIN_WIDTH)
    console.print(_table(asked, alone, console.width))
    for one in asked:
        if one.complaint is not None:
            console.print(
                f"[red]wrong:[/red] {escape(one.question.prompt[:60])} {escape(one.complaint)}", soft_wrap=True
            )
    console.print(_summary(asked), soft_wrap=True)
    console.print(f"ready after {start_seconds:.1f} s, questions answered in {ask_seconds:.1f} s")


def _table(asked: list[Asked], alone: int, width: int) -> Table:
    together = len(asked) - alone
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
    for place, one in enumerate(asked):
        table.add_row(*_row(one), end_section=place == alone - 1)
    return table


def _row(one: Asked) -> list[str]:
    texts = [escape(one.question.prompt), escape(one.answer.text if one.answer else one.error or "")]
    if one.answer is None:
        return [*texts, "[red]no[/red]"]
    timed = [*texts, _yes_no(one.is_right), f"{one.answer.ttft * 1e3:.0f}", f"{one.answer.itl * 1e3:.1f}"]
    how = one.answer.how
    if how is None:
        return timed
    moved = [str(how.blocks), f"{how.bytes / 1e3:.0f}", str(how.descriptors), _rate(how.bytes, how.transfer_time)]
    return [*timed, *moved, _yes_no(one.is_disaggregated)]


def _yes_no(fact: bool) -> str:
    return "[green]yes[/green]" if fact else "[red]no[/red]"


def _rate(moved: int, seconds: float) -> str:
    return f"{moved / seconds / 1e9:.2f}" if seconds > 0 else "-"


def _summary(asked: list[Asked]) -> str:
    right, moved = (sum(one.is_right for one in asked), sum(one.is_disaggregated for one in asked))
    color = "green" if right == moved == len(asked) else "red"
    text = f"[{color}]{right} of {len(asked)} answers right, {moved} disaggregated[/{color}]"
    answers = [one.answer for one in asked if one.answer is not None]
    hows = [answer.how for answer in answers if answer.how is not None]
    if not hows:
        return text
    size, blocks = sum(how.bytes for how in hows), sum(how.blocks for how in hows)
    descriptors, seconds = sum(how.descriptors for how in hows), sum(how.transfer_time for how in hows)
    transports = ", ".join(sorted({how.transport for how in hows if how.transport})) or "nothing"
    gaps = [gap for answer in answers for gap in answer.gaps]
    return (
        f"{text}; {size / 1e6:.1f} MB of KV in {blocks} blocks moved by {transports} with {descriptors} descriptors"
        f" at {_rate(size, seconds)} GB/s\n"
        f"medians: TTFT {statistics.median(answer.ttft for answer in answers) * 1e3:.0f} ms,"
        f" ITL {statistics.median(gaps or [0.0]) * 1e3:.1f} ms"
    )
