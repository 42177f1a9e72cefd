"""One client's connection, bounded: what uvicorn's protocol takes without end has an end here.

uvicorn's parser keeps headers of any size, waits for ever for the rest of a request and for a client that does not
read its answer, and goes on reading a body whose request has been answered. Here a head has a size and a time, an
answer must be read, and a connection with an unread body is closed after its answer.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from tandem.api.connections import Connections, Refusals, client_of
from tandem.api.http_errors import HeadTooLarge, TooSlow, raw_response
from tandem.config_limits import LimitsSection
from tandem.errors import InvalidRequest, Overloaded, RequestError

MAX_HEADERS = 256
MAX_PIPELINED = 16
LINGER_S = 1.0
"""A closed connection stays open so long for reading nothing more, as to close it at once would reset it, and the
client might lose the answer that tells why."""
CROWDED_HEAD = 4096
"""Bytes of a request's head where there are too many connections, of which only /health and /metrics are answered."""
ROUND_S = 0.01
"""So much later the event loop has looked at all that had come when a timer fired."""
MIN_READ = 16 * 2**10
"""Bytes of a large answer that a client reads at least in each --write-timeout."""
ALWAYS = (b"/health", b"/metrics")
"""Answered on any connection, also where there are too many of them."""


class BoundedProtocol(HttpToolsProtocol):
    """A connection; a request that is too large, or on a connection too many, does not reach the application."""

    def __init__(
        self,
        config: uvicorn.Config,
        state: ServerState,
        limits: LimitsSection,
        connections: Connections,
        refusals: Refusals,
    ) -> None:
        super().__init__(config, state, {})
        self._limits = limits
        self._max_head = limits.max_head
        self._connections = connections
        self._refusals = refusals
        self._client: str | None = None
        self._in_message = False  # from the end of a head to the end of its body
        self._unparsed = 0  # bytes since the parser last came to the end of something
        self._closing = False
        self._answer: _Answer | None = None
        self._answering: RequestResponseCycle | None = None  # the others that have come wait in `pipeline`
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._answer = _Answer(self)
        count = self._connections.opened()
        if count > self._connections.most:
            self._refusals.add("files")
            transport.abort()
            return
        if count > self._limits.max_connections:
            self._max_head = min(self._max_head, CROWDED_HEAD)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        self._stop_head_timer()
        self._stop_write_timer()
        self._connections.closed(self._client)
        waiting = [cycle for cycle, _ in self.pipeline]
        for cycle in (self._answering, *waiting):  # uvicorn tells the last one alone
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        self._unparsed += len(data)
        super().data_received(data)
        if self._closing:
            return
        if self._unparsed > self._max_head:
            self._refuse(HeadTooLarge(f"the request's line and headers have more than {self._max_head} bytes"))
        elif not self._in_message and self._head_timer is None and self.timeout_keep_alive_task is None:
            self._start_head_timer()

    def on_headers_complete(self) -> None:
        if self._closing:
            return
        self._unparsed = 0
        self._in_message = True
        self._stop_head_timer()
        refusal = self._find_refusal()
        if refusal is not None and not (isinstance(refusal, Overloaded) and self._asks_for(ALWAYS)):
            self._refuse(refusal)
            return
        super().on_headers_complete()
        assert self._answer is not None
        self.cycle.transport = self._answer
        if not self.pipeline:
            self._answering = self.cycle
        if refusal is not None:
            self.cycle.keep_alive = False
        if len(self.pipeline) > MAX_PIPELINED:
            self._refusals.add("pipelined")
            self.transport.abort()
        elif self.pipeline:
            self.flow.resume_reading()  # uvicorn stops, and would not notice that the client is gone

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_message:  # what comes after a chunked body is of no use here
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        if not self._closing:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._unparsed = 0
        self._in_message = False
        if not self._closing:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        if self._in_message and not self.pipeline:
            self.close_gently()
        if not self._closing:
            self._answering = self.pipeline[-1][0] if self.pipeline else None
            super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing(None)

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self._closing:
            self._stop_write_timer()

    def send_400_response(self, msg: str) -> None:
        self._refuse(InvalidRequest("this is no HTTP request"))

    def _unsupported_upgrade_warning(self) -> None:
        """The request is answered as any other; uvicorn would log it twice."""

    def close_gently(self) -> None:
        """Send what was written, read nothing more, and close."""
        if self._closing:
            return
        self._closing = True
        self._watch_writing(None)
        if self._in_message and self.transport.can_write_eof():
            self.flow.pause_reading()
            self.transport.write_eof()
            self.loop.call_later(LINGER_S, self.transport.close)
        else:
            self.transport.close()

    def _find_refusal(self) -> RequestError | None:
        if self._client is None:
            client = client_of(self.client[0] if self.client else "")
            try:
                self._connections.admit(client)
            except RequestError as error:
                return error
            self._client = client
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self._max_head or len(self.headers) > MAX_HEADERS:
            most = f"at most {self._max_head} bytes and {MAX_HEADERS} headers are taken"
            return HeadTooLarge(f"the request has {len(self.headers)} headers and, with its line, {size} bytes; {most}")
        return None

    def _asks_for(self, paths: tuple[bytes, ...]) -> bool:
        return self.parser.get_method() == b"GET" and self.url.partition(b"?")[0] in paths

    def _refuse(self, error: RequestError) -> None:
        """Answer what does not become a request, unless another request is being answered: then just close.

        It takes a fraction of what it takes to call the application, and there may be thousands of them at once.
        """
        self._refusals.add(error.code)
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()
            return
        self._in_message = True  # there may be more of it to come
        self.transport.write(raw_response(error))
        self.close_gently()

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self._limits.head_timeout, self._head_may_be_late)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_may_be_late(self) -> None:
        """Look once more at what has come: the event loop itself may have been late."""
        self._head_timer = self.loop.call_later(ROUND_S, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._closing:
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self._start_head_timer()  # the next request waits for the answer to this one
        elif self._unparsed:
            self._refuse(TooSlow(f"the request's headers did not come within {self._limits.head_timeout:g} s"))
        else:
            self.close_gently()

    def _watch_writing(self, left_before: int | None) -> None:
        """End a connection whose client reads nothing of what waits to be written; `left_before`: bytes of it."""
        self._stop_write_timer()
        left = self.transport.get_write_buffer_size()
        if left_before is not None and (not left or left > left_before - MIN_READ):
            self._reset()
            return
        self._write_timer = self.loop.call_later(self._limits.write_timeout, self._watch_writing, left)

    def _reset(self) -> None:
        """Close so that what the kernel has not yet sent goes too."""
        connection = self.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


class _Answer(asyncio.Transport):
    """The transport as one answer sees it: to close it lets the client read the answer first."""

    def __init__(self, protocol: BoundedProtocol) -> None:
        super().__init__()
        self._protocol = protocol

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        self._protocol.transport.write(data)

    def close(self) -> None:
        self._protocol.close_gently()

    def is_closing(self) -> bool:
        return self._protocol.transport.is_closing()
