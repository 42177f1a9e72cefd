"""A thin asynchronous client of the OpenAI API, with the fields that Tandem adds to its answers.

What goes wrong is a RequestError: the server's own one, or Unavailable (nobody there) and EngineFailed (it hung up).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Any, TypeVar

import aiohttp
import msgspec

from tandem.api.backend import ServingDetails
from tandem.errors import REQUEST_ERRORS, EngineFailed, InvalidRequest, RequestError, Unavailable, request_error

CONNECT_SECONDS = 30.0

Answered = TypeVar("Answered")


class Delta(msgspec.Struct, frozen=True):
    content: str | None = None


class EventChoice(msgspec.Struct, frozen=True):
    """Of a completion (`text`) or of a chat (`delta`)."""

    text: str = ""
    delta: Delta = Delta()
    token_ids: list[int] | None = None
    finish_reason: str | None = None

    @property
    def words(self) -> str:
        return self.text or self.delta.content or ""


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int | None = None


class Event(msgspec.Struct, frozen=True):
    """One event of a stream, for one choice. `tandem`: how the answer was made; other servers send none."""

    choices: list[EventChoice] = []
    usage: Usage | None = None
    tandem: ServingDetails | None = None
    error: dict[str, Any] | None = None


@dataclass(slots=True)
class Answer:
    """A streamed answer and when its parts came, in seconds of `time.perf_counter`.

    Attributes:
        arrivals: when each event that brought tokens or text came.
        token_ids: empty if they were not asked for.
    """

    sent: float
    ended: float = 0.0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    usage: Usage | None = None
    how: ServingDetails | None = None

    def take(self, event: Event, now: float) -> None:
        self.usage = event.usage or self.usage
        self.how = event.tandem or self.how
        for choice in event.choices:
            if choice.words or choice.token_ids:
                self.arrivals.append(now)
            self.text += choice.words
            self.token_ids += choice.token_ids or []
            self.finish_reason = choice.finish_reason or self.finish_reason

    @property
    def ttft(self) -> float:
        """Seconds to the first event with a token; to the end of an answer without any."""
        return (self.arrivals[0] if self.arrivals else self.ended) - self.sent

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies: seconds from each event to the next."""
        return [later - earlier for earlier, later in pairwise(self.arrivals)]

    @property
    def itl(self) -> float:
        """Their median; 0 with fewer than two events."""
        return statistics.median(self.gaps or [0.0])

    @property
    def output_tokens(self) -> int:
        if self.usage is not None and self.usage.completion_tokens is not None:
            return self.usage.completion_tokens
        return len(self.token_ids) or len(self.arrivals)


class ServerSentEvents:
    """Bytes of a stream, however they are cut, to the data of its events."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, received: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + received).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


class Client:
    """The API at `url`; use as an asynchronous context manager.

    Args:
        url: of the server, with or without `/v1` at its end.
        connections: most requests at once; 0 for as many as there are.
    """

    def __init__(self, url: str, *, api_key: str | None = None, connections: int = 0) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._connections = connections
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        self._http = aiohttp.ClientSession(
            headers=self._headers,
            connector=aiohttp.TCPConnector(limit=self._connections),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._http is not None:
            await self._http.close()

    async def get(self, path: str) -> Any:
        """The decoded JSON at `path`."""
        async with self._send("GET", path, None) as response:
            return msgspec.json.decode(await response.read())

    async def post(self, path: str, body: Mapping[str, Any], answer: type[Answered]) -> Answered:
        """The answer to `body`, as the msgspec struct `answer`."""
        async with self._send("POST", path, body) as response:
            return msgspec.json.decode(await response.read(), type=answer)

    async def model(self) -> str:
        """The name of the first model that is served."""
        return str((await self.get("/v1/models"))["data"][0]["id"])

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[Event, None]:
        """Events up to `[DONE]`. An error amid them is raised."""
        decoder = msgspec.json.Decoder(Event)
        events = ServerSentEvents()
        async with self._send("POST", path, {**body, "stream": True}) as response:
            async for received in response.content.iter_any():
                for data in events.feed(received):
                    if data == b"[DONE]":
                        return
                    event = decoder.decode(data)
                    if event.error is not None:
                        raise _error(500, {"error": event.error})
                    yield event
        raise EngineFailed(f"{self.url}{path}: the stream ended before it was complete")

    async def ask(self, path: str, body: Mapping[str, Any]) -> Answer:
        """A whole stream, timed."""
        answer = Answer(time.perf_counter())
        async with aclosing(self.stream(path, body)) as events:
            async for event in events:
                answer.take(event, time.perf_counter())
        answer.ended = time.perf_counter()
        return answer

    @asynccontextmanager
    async def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A good response; what happens to it inside is mapped as well."""
        if self._http is None:
            raise RuntimeError("a Client is used as an asynchronous context manager")
        data = None if body is None else msgspec.json.encode(body)
        headers = {"Content-Type": "application/json"} if data else {}
        try:
            async with self._http.request(method, self.url + path, data=data, headers=headers) as response:
                if response.status != 200:
                    raise _error(response.status, await _json(response))
                yield response
        except (aiohttp.ClientConnectorError, aiohttp.InvalidURL, aiohttp.ConnectionTimeoutError) as error:
            reason = getattr(error, "strerror", None) or error or type(error).__name__
            raise Unavailable(f"{self.url} cannot be reached: {reason}") from None
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            raise EngineFailed(f"{self.url}{path}: the connection was lost: {error or type(error).__name__}") from None
        except msgspec.DecodeError as error:
            raise EngineFailed(f"{self.url}{path}: the answer cannot be read: {error}") from None


async def _json(response: aiohttp.ClientResponse) -> Any:
    body = await response.read()
    try:
        return msgspec.json.decode(body)
    except msgspec.DecodeError:
        return body.decode(errors="replace")[:500]


def _error(status: int, body: Any) -> RequestError:
    """From OpenAI's error object, or whatever else came."""
    told = body.get("error") if isinstance(body, dict) else None
    if not isinstance(told, dict):
        told = {"message": f"HTTP status {status}: {body}"}
    code, message, param = str(told.get("code")), str(told.get("message")), told.get("param")
    if code not in REQUEST_ERRORS:
        code = InvalidRequest.code if 400 <= status < 500 else Unavailable.code if status == 503 else code
    return request_error(code, message, param)
