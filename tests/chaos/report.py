"""What many rounds came to: a table by kind of fault, and everything raw as JSON."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.chaos.load import BAD, Record
from tests.chaos.rounds import Round

HEADER = (
    "fault", "rounds", "requests", "right", "left", "typed errors", "lost with the router", "wrong", "untyped", "hung",
    "leaked",
    "slowest right answer: median, p90, max", "first good answer: median, p90, max", "whole: median, p90, max",
)  # fmt: skip


def table(rounds: Sequence[Round]) -> str:
    """Return a Markdown table: a row for each kind of fault, and one for all."""
    by_fault: dict[str, list[Round]] = defaultdict(list)
    for round_ in rounds:
        by_fault[round_.fault.name].append(round_)
    rows = [_row(name, by_fault[name]) for name in sorted(by_fault)] + [_row("all", rounds)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (HEADER, ["---"] * len(HEADER), *rows))


def _row(name: str, rounds: Sequence[Round]) -> list[str]:
    records = [record for round_ in rounds for record in round_.records]
    verdicts = Counter(record.verdict for record in records)
    codes = Counter(record.code for record in records if record.verdict == "error")
    missed = sum(not round_.hit for round_ in rounds)
    return [
        name,
        f"{len(rounds)}" + (f" ({missed} without a victim)" if missed else ""),
        str(len(records)),
        str(verdicts["right"]),
        str(verdicts["left"]),
        ", ".join(f"{code} {count}" for code, count in codes.most_common()) or "0",
        *(str(verdicts[verdict]) for verdict in ("lost", "wrong", "untyped", "hung")),
        str(sum(bool(round_.problems) for round_ in rounds)),
        _spread(round_.slowest for round_ in rounds if round_.hit),
        _spread(round_.first_good for round_ in rounds if round_.hit),
        _spread(round_.whole for round_ in rounds if round_.hit),
    ]


def _spread(values: Iterable[float | None]) -> str:
    known = sorted(value for value in values if value is not None)
    if not known:
        return "-"
    return ", ".join(f"{known[min(len(known) - 1, int(part * len(known)))]:.1f}" for part in (0.5, 0.9, 1.0)) + " s"


def has_failed(rounds: Sequence[Round]) -> bool:
    return any(round_.failures() or round_.problems for round_ in rounds)


def failures(rounds: Sequence[Round], replay: str) -> str:
    """Return every failure in words, with what is needed to see it again."""
    lines = []
    for round_ in rounds:
        bad = round_.failures()
        if not bad and not round_.problems:
            continue
        fault = round_.fault
        pause = f" for {fault.seconds} s" if fault.kind == "stop" else ""
        lines.append(
            f"round {round_.number}, {round_.connector}: {fault.name}{pause} ({round_.victim}), {fault.moment}"
        )
        lines.append(f"  again: {replay} --connector {round_.connector} --only {round_.number}")
        lines += [f"  {problem}" for problem in round_.problems]
        lines += [f"  {_told(record)}" for record in bad]
        lines += [f"  {ending}" for ending in round_.endings]
    return "\n".join(lines)


def _told(record: Record) -> str:
    stream = "stream" if record.stream else "whole"
    times = f"sent at {record.sent:.2f} s, ended at {record.ended:.2f} s"
    return f"{record.verdict}: question {record.question}, {stream}, {times}, {record.tokens} tokens: {record.detail}"


def typed_errors(rounds: Sequence[Round]) -> str:
    """Return typed errors by code, message and fault, and how many had a usable engine of each role beside them."""
    seen: Counter[tuple[str, str, str]] = Counter()
    served: Counter[tuple[str, str, str]] = Counter()
    for round_ in rounds:
        for record in round_.records:
            if record.verdict == "error":
                key = (record.code, round_.fault.name, record.detail[:150])
                seen[key] += 1
                roles = {name.partition("-")[0] for name in record.usable or ()}
                served[key] += roles >= {"prefill", "decode"}
    lines = [
        f"{count:5}  {code}, {fault}: {detail} ({served[code, fault, detail]} with a whole path left)"
        for (code, fault, detail), count in seen.most_common()
    ]
    return "\n".join(lines)


def growth(rounds: Sequence[Round]) -> str:
    """Return memory and open files of commands at the first and the last pause of the load in one start of theirs."""
    first: dict[tuple[str, str, int], tuple[int, int, int]] = {}
    last: dict[tuple[str, str, int], tuple[int, int, int]] = {}
    for round_ in rounds:
        for name, (starts, memory, files) in round_.resources.items():
            key = (round_.connector, name, starts)
            last[key] = (round_.number, memory, files)
            first.setdefault(key, last[key])
    return "\n".join(
        f"{connector} {name}, rounds {first[key][0]} to {last[key][0]}: memory {first[key][1] >> 20} to "
        f"{last[key][1] >> 20} MiB, open files {first[key][2]} to {last[key][2]}"
        for key in first
        if last[key][0] - first[key][0] >= 5
        for connector, name, _ in [key]
    )


def save(file: Path, settings: dict[str, Any], rounds: Sequence[Round]) -> None:
    """Write everything raw."""
    bad = {verdict: sum(r.verdict == verdict for each in rounds for r in each.records) for verdict in BAD}
    body = {"settings": settings, "bad": bad, "rounds": [round_.as_json() for round_ in rounds]}
    file.write_text(json.dumps(body, indent=1))
