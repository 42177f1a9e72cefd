"""The frame around every request with a body: let in, read, watched, counted, and its errors answered."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import msgspec
from starlette.types import Receive, Scope, Send

from tandem.api.backend import Backend, ModelCard
from tandem.api.door import Admission, Door
from tandem.api.http_errors import BodyTooLarge, ClientGone, ModelNotFound, TooSlow, clipped, unexpected
from tandem.api.loaded_model import LoadedModel, ModelLoader
from tandem.api.metrics import Metrics, RequestMetrics
from tandem.api.middleware import client_name, request_id_of
from tandem.api.openai import ChatMessage
from tandem.api.parsing import parse
from tandem.api.prepared_request import PreparedRequest
from tandem.api.response_writer import OPENAIS, ErrorShape, ResponseWriter
from tandem.api.turnstile import Turnstile
from tandem.config_limits import LimitsSection
from tandem.errors import InvalidRequest, RequestError, Unavailable

log = logging.getLogger(__name__)

Kind = Literal["router", "engine"]
ReadBody = TypeVar("ReadBody", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class Services:
    """Shared by all endpoints of an application; `create_app` explains most. `door` and `turnstile` let requests in."""

    backend: Backend
    loader: ModelLoader
    metrics: Metrics
    kind: Kind
    door: Door
    turnstile: Turnstile


@dataclass(slots=True)
class OpenRequest:
    """A request whose body has been read.

    Attributes:
        raw: the one body, to be taken out so that it goes once it is parsed.
    """

    id: str
    raw: list[bytearray]
    admission: Admission
    writer: ResponseWriter
    metrics: RequestMetrics


@dataclass(frozen=True)
class FramedEndpoint(ABC):
    """An ASGI application that answers POST requests of one path.

    Args:
        name: of the endpoint, for logs and metrics.

    Attributes:
        errors: how this API writes them, those of the door too.
    """

    errors: ClassVar[ErrorShape] = OPENAIS

    name: str
    services: Services

    @abstractmethod
    async def respond(self, request: OpenRequest) -> None:
        """Answer a request. Raises RequestError."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = request_id_of(scope)
        services = self.services
        writer = ResponseWriter(scope, receive, send, self.errors)
        with services.metrics.track(self.name) as metrics:
            try:
                with services.door.request(client_name(scope)) as admission:
                    raw = [await read_body(scope, receive, services.door.limits, admission)]
                    request = OpenRequest(request_id, raw, admission, writer, metrics)
                    await unless_gone(receive, writer, self.respond(request))
                metrics.outcome = "ok"
            except ClientGone:
                metrics.outcome = "aborted"
            except RequestError as error:
                metrics.outcome = error.code
                await writer.error(error)
            except asyncio.CancelledError:  # only the server cancels, when it stops; the task ends here all the same
                metrics.outcome = Unavailable.code
                await writer.error(Unavailable("the server is stopping; send the request again"))
            except Exception:
                log.exception("request %s: %s failed", request_id, self.name)
                metrics.outcome = RequestError.code
                await writer.error(unexpected())
            finally:
                log.debug("request %s: %s ended: %s", request_id, self.name, metrics.outcome)

    async def read(self, request: OpenRequest, kind: type[ReadBody]) -> tuple[LoadedModel, ReadBody]:
        """Return the model and the request's body, once its turn has come to be parsed. Raises RequestError."""
        model = await self.services.loader.get()
        await self.services.turnstile.wait()
        return model, parse(request.raw.pop(), kind, model.card.max_model_len)

    def log_prepared(self, request: PreparedRequest, user: str | None) -> None:
        """Log a request that goes to the backend."""
        counts = f"{len(request.sequences)} sequences, {request.prompt_tokens} prompt tokens"
        by_user = f", user {user[:128]!r}" if user else ""
        log.info("request %s: %s, %s%s", request.request_id, self.name, counts, by_user)

    def check_messages(self, messages: list[ChatMessage] | None) -> None:
        """Raise InvalidRequest for more messages than are taken."""
        most = self.services.door.limits.max_messages
        if messages is not None and len(messages) > most:
            raise InvalidRequest(f"there are {len(messages)} messages; at most {most} are taken", param="messages")


def check_model(name: str | None, card: ModelCard) -> None:
    """Raise ModelNotFound for another model than the one that is served."""
    if name is not None and not card.is_called(name):
        raise ModelNotFound(f"there is no model {clipped(name)!r} here; it is {card.name!r}", param="model")


async def read_body(scope: Scope, receive: Receive, limits: LimitsSection, admission: Admission) -> bytearray:
    """Return the whole body.

    Raises BodyTooLarge as soon as it is known to be, Overloaded if there is no memory for it, TooSlow, and ClientGone.
    """
    length = dict(scope["headers"]).get(b"content-length", b"0")
    if length.isdigit() and int(length) > limits.max_body:
        raise BodyTooLarge(f"the body has {int(length)} bytes; at most {limits.max_body} are taken")
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                part = message.get("body", b"")
                admission.take_bytes(len(part))
                body += part
                if len(body) > limits.max_body:
                    raise BodyTooLarge(f"the body has more than the {limits.max_body} bytes that are taken")
                if not message.get("more_body", False):
                    return body
    except TimeoutError:
        raise TooSlow(f"of the body only {len(body)} bytes came within {limits.body_timeout:g} s") from None


async def unless_gone(receive: Receive, writer: ResponseWriter, work: Coroutine[Any, Any, None]) -> None:
    """Await `work`; cancel it and raise ClientGone when the client closes its connection before it is answered."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_client_gone(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done() and not writer.answered:
            raise ClientGone
        await working
    finally:
        watching.cancel()
        working.cancel()
        await asyncio.gather(watching, working, return_exceptions=True)


async def _client_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
