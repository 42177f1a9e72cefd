"""Calls an ASGI application in this process, as a client that sends its body in one piece and stays."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp

from tests.fuzz.fakes import Defect

ALLOWED = {200, 400, 401, 404, 405, 413, 422, 429, 503}


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes


async def call(
    app: ASGIApp, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> Answer:
    """Return the answer once it is whole. Raises Defect if it has no end."""
    given = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in (headers or {}).items()]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": given,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    incoming.put_nowait({"type": "http.request", "body": body, "more_body": False})
    status, parts, whole = 0, [], False

    async def send(message: Any) -> None:
        nonlocal status, whole
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            parts.append(message.get("body", b""))
            whole = not message.get("more_body", False)

    await app(scope, incoming.get, send)
    if not whole:
        raise Defect(f"{method} {path}: the answer has status {status} and no end")
    return Answer(status, b"".join(parts))
