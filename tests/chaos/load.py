"""Requests whose right answers are known, and the verdict on what came back."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import aiohttp

from tests.chaos.support import Reference

LOGPROB_TOLERANCE = 1e-3


@dataclass
class Choice:
    """One choice of an answer, whole or as far as it came."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    finish: str | None = None


@dataclass
class Answer:
    """What a client has received.

    Attributes:
        error: the error object, if there was one.
        broken: what was against the protocol: an error without type, a stream without end.
        left: the client went away on purpose.
        how: the `tandem` object of the first choice.
        first, pause: seconds to the first event, and the longest pause between two.
    """

    choices: list[Choice]
    status: int = 0
    error: dict[str, Any] | None = None
    broken: str = ""
    lost: str = ""
    left: bool = False
    how: dict[str, Any] = field(default_factory=dict)
    first: float | None = None
    pause: float = 0.0


@dataclass(frozen=True)
class Question:
    """What is asked. `body` is that of the API, without `stream`."""

    number: int
    path: str
    body: Mapping[str, Any]

    @property
    def choices(self) -> int:
        return int(self.body.get("n", 1))

    @property
    def is_plain_greedy(self) -> bool:
        """Whether transformers can be asked the same."""
        return (
            self.path == "/v1/completions" and self.body["temperature"] == 0 and isinstance(self.body["prompt"], list)
        )


def questions(seed: int, number: int) -> list[Question]:
    """Return questions of many lengths that share prefixes: greedy or seeded, some with logprobs or two choices."""
    rng = random.Random(f"{seed}/questions")
    prefixes = [rng.choices(range(256), k=length) for length in (16, 48, 64, 130, 200, 256)]
    return [_question(rng, index, prefixes) for index in range(number)]


def _question(rng: random.Random, number: int, prefixes: Sequence[list[int]]) -> Question:
    body: dict[str, Any] = {
        "max_tokens": rng.choice([1, 2, 4, 8, 16, 16, 24, 32, 48, 64, 160]),
        "ignore_eos": True,
        "return_token_ids": True,
        "temperature": 0,
    }
    if rng.random() < 0.5:
        body |= {"temperature": 1.0, "top_p": 0.95, "top_k": 40, "seed": rng.randrange(1 << 31)}
    if rng.random() < 0.2:
        body |= {"repetition_penalty": 1.2, "presence_penalty": 0.3}
    if rng.random() < 0.1:
        body["n"] = 2
    words = " ".join(
        rng.choice(["sort", "add", "reverse", "the", "seven", "apples"]) for _ in range(rng.randint(1, 20))
    )
    kind = rng.random()
    if kind < 0.1:
        chat: dict[str, Any] = {"messages": [{"role": "user", "content": words}]}
        if rng.random() < 0.5:
            chat["logprobs"] = True
        return Question(number, "/v1/chat/completions", body | chat)
    if kind < 0.2:
        body["prompt"] = words
    else:
        prefix = rng.choice(prefixes)
        own = rng.choices(range(256), k=rng.randint(1, 120))
        body["prompt"] = prefix[: rng.randint(0, len(prefix))] + own
    if rng.random() < 0.3:
        body["logprobs"] = rng.choice([0, 2])
    return Question(number, "/v1/completions", body)


@dataclass(frozen=True)
class Request:
    """One asking of a question. `leaves`: the client is gone after as many token events."""

    question: Question
    stream: bool = False
    leaves: int | None = None


class Events:
    """Counts what the clients see, so that a fault can come at a moment that can be found again."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._changed = asyncio.Condition()

    async def saw(self, event: str) -> None:
        async with self._changed:
            self._counts[event] += 1
            self._changed.notify_all()

    async def reached(self, event: str, count: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._counts[event] >= count)


async def ask(
    http: aiohttp.ClientSession, url: str, request: Request, seconds: float, events: Events | None = None
) -> Answer | None:
    """Ask, and return what came back; None if it did not end within `seconds`."""
    answer = Answer([Choice() for _ in range(request.question.choices)])
    timeout = aiohttp.ClientTimeout(total=None)
    body = dict(request.question.body) | ({"stream": True} if request.stream else {})
    try:
        async with asyncio.timeout(seconds):
            if events is not None:
                await events.saw("sent")
            async with http.post(url + request.question.path, json=body, timeout=timeout) as response:
                answer.status = response.status
                if request.stream and response.status == 200:
                    await _read_stream(response, request, answer, events or Events())
                else:
                    _take_whole(answer, await response.read())
    except TimeoutError:
        return None
    except (aiohttp.ClientError, OSError) as error:
        answer.lost = repr(error)
    return answer


def _take_whole(answer: Answer, raw: bytes) -> None:
    try:
        body = json.loads(raw)
    except ValueError:
        answer.broken = f"status {answer.status}, no JSON: {raw[:200]!r}"
        return
    if answer.status != 200:
        _take_error(answer, body)
        return
    _take_choices(answer, body)
    _take_how(answer, body)


def _take_error(answer: Answer, body: Any) -> None:
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict) and error.get("type") and error.get("code") and error.get("message"):
        answer.error = error
    else:
        answer.broken = f"status {answer.status}, an error without message, type and code: {str(body)[:200]}"


def _take_choices(answer: Answer, body: dict[str, Any]) -> int:
    """Add what a body or event brings; return how many tokens that was."""
    new = 0
    for part in body["choices"]:
        choice = answer.choices[part["index"]]
        said = part.get("message") or part.get("delta") or {"content": part.get("text")}
        choice.text += said.get("content") or ""
        choice.tokens += part.get("token_ids") or []
        new += len(part.get("token_ids") or [])
        choice.finish = part.get("finish_reason") or choice.finish
        if logprobs := part.get("logprobs"):
            content = logprobs.get("content")
            choice.logprobs += logprobs["token_logprobs"] if content is None else [each["logprob"] for each in content]
    return new


def _take_how(answer: Answer, body: dict[str, Any]) -> None:
    how = body.get("tandem") or {}
    answer.how = how[0] if isinstance(how, list) else how


async def _read_stream(response: aiohttp.ClientResponse, request: Request, answer: Answer, events: Events) -> None:
    token_events, before = 0, time.monotonic()
    started = before
    async for line in response.content:
        text = line.decode().strip()
        if not text.startswith("data:"):  # an empty line, or a comment that keeps the connection alive
            continue
        if text == "data: [DONE]":
            return
        event = json.loads(text.removeprefix("data:"))
        if "error" in event:
            _take_error(answer, event)
            continue
        if _take_choices(answer, event):
            now = time.monotonic()
            if answer.first is None:
                answer.first = now - started
                await events.saw("first token")
            else:
                answer.pause = max(answer.pause, now - before)
            before = now
            token_events += 1
            await events.saw("token")
            if token_events == request.leaves:
                answer.left = True
                response.close()
                return
        if event.get("tandem"):
            _take_how(answer, event)
    if answer.error is None:
        answer.broken = "the stream ended without [DONE] and without an error"


def difference(answer: Answer, right: Answer) -> str:
    """Return how an answer differs from the right one, or nothing; what did not end is compared as far as it came."""
    partial = bool(answer.left or answer.error or answer.lost or answer.broken)
    for index, (got, want) in enumerate(zip(answer.choices, right.choices, strict=True)):
        expected = want.tokens[: len(got.tokens)] if partial else want.tokens
        if got.tokens != expected:
            at = next(
                (i for i, (a, b) in enumerate(zip(got.tokens, expected, strict=False)) if a != b),
                min(len(got.tokens), len(expected)),
            )
            return (
                f"choice {index}, {len(got.tokens)} tokens for {len(expected)}, from token {at}: "
                f"{got.tokens[at : at + 8]} for {expected[at : at + 8]}"
            )
        if any(abs(a - b) > LOGPROB_TOLERANCE for a, b in zip(got.logprobs, want.logprobs, strict=False)):
            return f"choice {index}: other logprobs"
        if partial:
            continue
        if len(got.logprobs) != len(want.logprobs):
            return f"choice {index}: {len(got.logprobs)} logprobs for {len(want.logprobs)}"
        if (got.text, got.finish) != (want.text, want.finish):
            return f"choice {index}: text or finish {got.text!r} {got.finish} for {want.text!r} {want.finish}"
    return ""


def incomplete(question: Question, answer: Answer) -> str:
    """Return what a whole answer lacks, whatever the right tokens are."""
    for choice in answer.choices:
        if len(choice.tokens) != question.body["max_tokens"] or choice.finish != "length":
            return f"{len(choice.tokens)} tokens for {question.body['max_tokens']}, finish {choice.finish}"
        if question.body.get("logprobs") is not None and len(choice.logprobs) != len(choice.tokens):
            return f"{len(choice.logprobs)} logprobs for {len(choice.tokens)} tokens"
    return ""


@dataclass
class Record:
    """One request and what became of it. Times in seconds from the start of its round."""

    round: int
    question: int
    stream: bool
    leaves: int | None
    probe: bool
    sent: float
    ended: float = 0.0
    verdict: str = ""
    code: str = ""
    detail: str = ""
    tokens: int = 0
    first: float | None = None
    pause: float = 0.0
    how: dict[str, Any] = field(default_factory=dict)
    usable: list[str] | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


GOOD = ("right", "left")
BAD = ("wrong", "untyped", "hung")
"""Verdicts beside these: `error` (typed) and `lost` (the connection, when the router died)."""


class Book:
    """Questions and their right answers, taken from a cluster that nobody disturbs.

    Attributes:
        problems: answers that were not whole, or not the same twice, although nobody disturbed.
    """

    def __init__(self, asked: Sequence[Question]) -> None:
        self.questions = list(asked)
        self.answers: dict[int, Answer] = {}
        self.problems: list[str] = []

    async def fill(self, http: aiohttp.ClientSession, url: str, seconds: float) -> None:
        """Ask everything until it was answered twice alike. Raises AssertionError if even that does not work."""
        gate = asyncio.Semaphore(12)

        async def one(question: Question) -> None:
            before: Answer | None = None
            for attempt in range(6):
                async with gate:
                    answer = await ask(http, url, Request(question, stream=attempt % 2 == 1), seconds)
                if answer is None or answer.error or answer.broken or answer.lost:
                    raise AssertionError(f"undisturbed, question {question.number} was answered with {answer}")
                missing = incomplete(question, answer)
                if not missing and before is not None and not difference(answer, before):
                    self.answers[question.number] = before
                    return
                other = before is not None and difference(answer, before)
                if missing or other:
                    self.problems.append(f"undisturbed, question {question.number}: {missing or other}; {answer.how}")
                before = before if missing else answer
            raise AssertionError(f"question {question.number} was not answered twice alike: {question}")

        async with asyncio.TaskGroup() as group:
            for question in self.questions:
                group.create_task(one(question))

    def check_against(self, reference: Reference, number: int) -> None:
        """Compare some greedy answers with transformers'."""
        plain = [q for q in self.questions if q.is_plain_greedy and "repetition_penalty" not in q.body]
        for question in sorted(plain, key=lambda q: -int(q.body["max_tokens"]))[:number]:
            want = reference(question.body["prompt"], question.body["max_tokens"])
            for choice in self.answers[question.number].choices:
                assert choice.tokens == want, f"question {question.number}: {choice.tokens}, transformers says {want}"

    def verdict(self, question: Question, answer: Answer | None) -> tuple[str, str, str]:
        """Return verdict, code and detail. A lost connection is `untyped` here; the caller knows who died."""
        if answer is None:
            return "hung", "", "no end within the deadline and its grace"
        wrong = difference(answer, self.answers[question.number])
        if wrong:
            return "wrong", "", wrong
        if answer.broken or answer.lost:
            return "untyped", "", answer.broken or answer.lost
        if answer.error is not None:
            return "error", str(answer.error["code"]), str(answer.error["message"])
        return ("left" if answer.left else "right"), "", ""
