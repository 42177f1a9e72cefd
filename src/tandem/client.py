"""An asynchronous client of the OpenAI API, with the fields that Tandem adds to its responses.

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
from typing import Any

import aiohttp
import msgspec

from tandem.api.backend import ServingDetails
from tandem.errors import REQUEST_ERRORS, EngineFailed, InvalidRequest, RequestError, Unavailable, request_error

DEFAULT_URL = "http://127.0.0.1:8000"
"""Of `tandem serve` and `tandem router` on this machine."""
CONNECT_SECONDS = 30.0


class Message(msgspec.Struct, frozen=True):
    content: str | None = None


class Choice(msgspec.Struct, frozen=True):
    """One choice of a completion (`text`), a chat (`message`) or a chat's stream (`delta`)."""

    text: str = ""
    message: Message = Message()
    delta: Message = Message()
    token_ids: list[int] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: dict[str, Any] | None = None

    @property
    def content(self) -> str:
        return self.text or self.message.content or self.delta.content or ""


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int | None = None


class Response(msgspec.Struct, frozen=True):
    """A whole response or one event of a stream. `tandem`: how it was served; other servers send none."""

    choices: list[Choice] = []
    usage: Usage | None = None
    tandem: ServingDetails | None = None
    error: dict[str, Any] | None = None


@dataclass(slots=True)
class TimedCompletion:
    """A streamed completion and when its parts came, in seconds of `time.perf_counter`.

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
    details: ServingDetails | None = None

    def add(self, event: Response, now: float) -> None:
        self.usage = event.usage or self.usage
        self.details = event.tandem or self.details
        for choice in event.choices:
            if choice.content or choice.token_ids:
                self.arrivals.append(now)
            self.text += choice.content
            self.token_ids += choice.token_ids or []
            self.finish_reason = choice.finish_reason or self.finish_reason

    @property
    def ttft(self) -> float:
        """Seconds to the first event with a token; to the end of a completion without any."""
        return (self.arrivals[0] if self.arrivals else self.ended) - self.sent

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies: seconds from each event to the next."""
        return [later - earlier for earlier, later in pairwise(self.arrivals)]

    @property
    def itl(self) -> float:
        """The median of the gaps; 0 with fewer than two events."""
        return statistics.median(self.gaps or [0.0])

    @property
    def output_tokens(self) -> int:
        if self.usage is not None and self.usage.completion_tokens is not None:
            return self.usage.completion_tokens
        return len(self.token_ids) or len(self.arrivals)


class ServerSentEvents:
    """Makes the events of a stream from its bytes, however they are cut."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, received: bytes) -> list[bytes]:
        """Return the data of the events that `received` completes."""
        *lines, self._rest = (self._rest + received).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


class Client:
    """The API at `url`; use as an asynchronous context manager.

    Args:
        url: of the server, with or without `/v1` at its end.
        connections: most requests at once; 0 for no limit.
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
        """Return the decoded JSON at `path`."""
        async with self._send("GET", path, None) as response:
            return msgspec.json.decode(await response.read())

    async def unhealthy(self) -> str | None:
        """Return why the server cannot serve a request, in its own words; None if it can, or does not say."""
        async with self._send("GET", "/health", None, accepted=(200, 503)) as response:
            health = msgspec.json.decode(await response.read(), type=dict[str, str])
            return health.get("detail") if response.status == 503 else None

    async def post(self, path: str, body: Mapping[str, Any]) -> Response:
        """Return the whole response to `body`."""
        async with self._send("POST", path, body) as response:
            return msgspec.json.decode(await response.read(), type=Response)

    async def operate(self, path: str) -> Any:
        """Have a router do to an engine what `path` says; return the decoded JSON of its answer."""
        async with self._send("POST", path, None, accepted=(200, 202)) as response:
            return msgspec.json.decode(await response.read())

    async def model(self) -> str:
        """Return the name of the first model that is served."""
        return str((await self.get("/v1/models"))["data"][0]["id"])

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[Response, None]:
        """Yield the events up to `[DONE]`; raise an error that is among them."""
        decoder = msgspec.json.Decoder(Response)
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

    async def complete(self, path: str, body: Mapping[str, Any]) -> TimedCompletion:
        """Return the completion of `body`, streamed and timed."""
        completion = TimedCompletion(time.perf_counter())
        async with aclosing(self.stream(path, body)) as events:
            async for event in events:
                completion.add(event, time.perf_counter())
        completion.ended = time.perf_counter()
        return completion

    @asynccontextmanager
    async def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None, accepted: tuple[int, ...] = (200,)
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Yield a response with an accepted status; errors in reading it are mapped as well."""
        if self._http is None:
            raise RuntimeError("a Client is used as an asynchronous context manager")
        data = None if body is None else msgspec.json.encode(body)
        headers = {"Content-Type": "application/json"} if data else {}
        try:
            async with self._http.request(method, self.url + path, data=data, headers=headers) as response:
                if response.status not in accepted:
                    raise _error(response.status, await _json(response))
                yield response
        except (aiohttp.ClientConnectorError, aiohttp.InvalidURL, aiohttp.ConnectionTimeoutError) as error:
            reason = getattr(error, "strerror", None) or error or type(error).__name__
            raise Unavailable(f"{self.url} cannot be reached: {reason}") from None
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            raise EngineFailed(f"{self.url}{path}: the connection was lost: {error or type(error).__name__}") from None
        except msgspec.DecodeError as error:
            raise EngineFailed(f"{self.url}{path}: the response cannot be read: {error}") from None


async def _json(response: aiohttp.ClientResponse) -> Any:
    body = await response.read()
    try:
        return msgspec.json.decode(body)
    except msgspec.DecodeError:
        return body.decode(errors="replace")[:500]


def _error(status: int, body: Any) -> RequestError:
    """Make the exception of OpenAI's error object, or of whatever else came."""
    found = body.get("error") if isinstance(body, dict) else None
    if not isinstance(found, dict):
        found = {"message": f"HTTP status {status}: {body}"}
    code, message, param = str(found.get("code")), str(found.get("message")), found.get("param")
    if code not in REQUEST_ERRORS:
        code = InvalidRequest.code if 400 <= status < 500 else Unavailable.code if status == 503 else code
    failure = request_error(code, message, param)
    failure.status = status
    return failure
