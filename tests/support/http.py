"""A plain HTTP client for the API: one connection a request, so that closing it means that the client is gone."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

TIMEOUT = 45.0


@dataclass(frozen=True)
class Reply:
    """`headers`: names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.json["error"]
        return error

    @property
    def choice(self) -> dict[str, Any]:
        """The only choice."""
        assert self.status == 200, self.body.decode()
        [choice] = self.json["choices"]
        only: dict[str, Any] = choice
        return only

    @property
    def token_ids(self) -> list[int]:
        token_ids: list[int] = self.choice["token_ids"]
        return token_ids

    @property
    def how(self) -> dict[str, Any]:
        """The `tandem` object."""
        assert self.status == 200, self.body.decode()
        details: dict[str, Any] = self.json["tandem"]
        return details


class Stream:
    """A streaming answer, event by event. Close it early, and the client is gone."""

    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self._connection = connection
        # Kept here: http.client lets go of it once the answer says that the connection will be closed.
        self._socket = connection.sock
        self.response = connection.getresponse()
        if self.response.status != 200:
            body = self.response.read().decode()
            self.close()
            raise AssertionError(f"{self.response.status}: {body}")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Events; the stream must end with [DONE]."""
        while line := self.response.readline():
            text = line.decode().strip()
            if text == "data: [DONE]":
                self.close()
                return
            if text and not text.startswith(":"):
                event = json.loads(text.removeprefix("data: "))
                assert "error" not in event, event
                yield event
        raise AssertionError("the stream ended without [DONE]")

    def token_ids(self) -> list[int]:
        """Of all that comes, for one choice."""
        return [token for event in self for choice in event["choices"] for token in choice["token_ids"]]

    def close(self) -> None:
        hang_up(self._socket)
        self._connection.close()


class Http:
    """The API at `url`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._at = urlsplit(url)

    def get(self, path: str) -> Reply:
        return self.send("GET", path)

    def send(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        connection = self.start(method, path, body, headers)
        response = connection.getresponse()
        reply = Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        connection.close()
        return reply

    def complete(self, prompt: list[int] | str, headers: dict[str, str] | None = None, **options: Any) -> Reply:
        """Greedy unless told otherwise, with token ids."""
        return self.send("POST", "/v1/completions", completion(prompt, **options), headers)

    def stream(self, prompt: list[int] | str, **options: Any) -> Stream:
        return Stream(self.start("POST", "/v1/completions", completion(prompt, stream=True, **options)))

    def start(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> http.client.HTTPConnection:
        """A request that was sent and whose answer nobody has read yet."""
        connection = http.client.HTTPConnection(self._at.hostname or "", self._at.port, timeout=TIMEOUT)
        raw = None if body is None else json.dumps(body).encode()
        connection.request(method, path, raw, headers or {})
        return connection


def completion(prompt: list[int] | str, **options: Any) -> dict[str, Any]:
    return {"prompt": prompt, "temperature": 0, "return_token_ids": True} | options


def hang_up(connection: socket.socket | None) -> None:
    """As a client that is killed."""
    if connection is not None:
        try:
            connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        connection.close()
