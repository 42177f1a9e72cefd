"""The OpenAI-compatible HTTP application; the router and every engine have one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tandem import __version__
from tandem.api import messages_api, openapi_page, responses_api
from tandem.api.api_keys import ApiKeys
from tandem.api.backend import Backend, EngineOperator, KnownEngine, ModelCard
from tandem.api.chat import ChatBuilder, count_chats, prepare_chat
from tandem.api.completions import CompletionBuilder, count_completions, prepare_completion
from tandem.api.connections import Refusals
from tandem.api.count_tokens import CountTokensEndpoint
from tandem.api.door import Door
from tandem.api.endpoint import GenerateEndpoint
from tandem.api.http_errors import (
    MethodNotAllowed,
    NotFound,
    clipped,
    error_response,
    json_response,
    unexpected,
)
from tandem.api.loaded_model import ModelLoader
from tandem.api.messages_api import MessagesBody
from tandem.api.metrics import CONTENT_TYPE, Metrics
from tandem.api.middleware import ApiMiddleware
from tandem.api.openai import ChatBody, CompletionBody
from tandem.api.operator_endpoints import operator_routes
from tandem.api.request_frame import Kind, Services, check_model
from tandem.api.responses_api import ResponsesBody
from tandem.api.text_endpoints import DetokenizeEndpoint, TokenizeEndpoint
from tandem.api.translated import TranslatedEndpoint
from tandem.api.turnstile import Turnstile
from tandem.config_limits import LimitsSection
from tandem.errors import RequestError, Unavailable


def create_app(
    backend: Backend,
    loader: ModelLoader,
    *,
    kind: Kind,
    keys: ApiKeys | None = None,
    limits: LimitsSection | None = None,
    refusals: Refusals | None = None,
    operator: EngineOperator | None = None,
) -> Starlette:
    """Return the application in front of `backend`.

    Args:
        loader: loads the backend's model.
        kind: "router" has /tandem/engines and refuses kv_transfer_params; "engine" has /tandem/engine.
        keys: clients must bring one of them for /v1/ and to run engines; None for no keys.
        limits: what clients may ask for.
        refusals: of the server, which its metrics show.
        operator: runs the engines; a router has one.
    """
    metrics = Metrics(backend, refusals or Refusals())
    services = Services(backend, loader, metrics, kind, Door(limits or LimitsSection()), Turnstile())
    return Starlette(
        routes=[
            *_routes_with_bodies(services),
            *_routes_to_read(InfoEndpoints(services), kind),
            *(operator_routes(operator) if operator is not None else []),
        ],
        middleware=[Middleware(ApiMiddleware, keys=keys)],
        exception_handlers={404: _not_found, 405: _method_not_allowed, RequestError: _failed, Exception: _failed},
    )


def _routes_with_bodies(services: Services) -> list[Route]:
    completions = GenerateEndpoint(
        "completions", services, CompletionBody, count_completions, prepare_completion, CompletionBuilder
    )
    chat = GenerateEndpoint("chat", services, ChatBody, count_chats, prepare_chat, ChatBuilder)
    responses = TranslatedEndpoint(
        "responses", services, ResponsesBody, responses_api.to_chat, responses_api.ResponsesAnswer
    )
    messages = TranslatedEndpoint("messages", services, MessagesBody, messages_api.to_chat, messages_api.MessagesAnswer)
    return [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/responses", responses, methods=["POST"]),
        Route("/v1/messages", messages, methods=["POST"]),
        Route("/v1/messages/count_tokens", CountTokensEndpoint("count_tokens", services), methods=["POST"]),
        Route("/tokenize", TokenizeEndpoint("tokenize", services), methods=["POST"]),
        Route("/detokenize", DetokenizeEndpoint("detokenize", services), methods=["POST"]),
    ]


def _routes_to_read(info: InfoEndpoints, kind: Kind) -> list[Route]:
    return [
        _get("/v1/models", info.models),
        _get("/v1/models/{name:path}", info.model),
        _get("/health", info.health),
        _get("/ping", info.health),
        Route("/ping", info.health, methods=["POST"]),
        _get("/openapi.json", openapi_page.document),
        _get("/docs", openapi_page.page),
        _get("/version", info.version),
        _get("/load", info.load),
        _get("/metrics", info.metrics),
        _get("/tandem/engines", info.engines) if kind == "router" else _get("/tandem/engine", info.engine),
    ]


class InfoEndpoints:
    """Answer the GET requests: models, health, metrics, engines."""

    def __init__(self, services: Services) -> None:
        self._backend = services.backend
        self._metrics = services.metrics
        self._door = services.door

    async def models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [_describe_model(await self._backend.model())]})

    async def model(self, request: Request) -> Response:
        card = await self._backend.model()
        check_model(request.path_params["name"], card)
        return json_response(_describe_model(card))

    async def health(self, request: Request) -> Response:
        health = self._backend.health()
        status = "ok" if health.ok else "unavailable"
        return json_response({"status": status, "detail": health.detail}, 200 if health.ok else 503)

    async def version(self, request: Request) -> Response:
        return json_response({"version": __version__})

    async def load(self, request: Request) -> Response:
        return json_response({"server_load": self._door.open_requests})

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.expose(), headers={"content-type": CONTENT_TYPE})

    async def engines(self, request: Request) -> Response:
        engines = self._backend.engines()
        described = [_describe_engine(one) | {"state": one.state.value, "reason": one.reason} for one in engines]
        return json_response({"engines": described})

    async def engine(self, request: Request) -> Response:
        engines = self._backend.engines()
        if not engines:
            raise Unavailable("the engine has not started yet")
        return json_response(_describe_engine(engines[0]))


def _get(path: str, endpoint: Callable[[Request], Awaitable[Response]]) -> Route:
    route = Route(path, endpoint)
    route.methods = {"GET"}  # Starlette adds HEAD, which is answered with 405 here
    return route


async def _failed(request: Request, error: Exception) -> Response:
    return error_response(error if isinstance(error, RequestError) else unexpected())


async def _not_found(request: Request, error: Exception) -> Response:
    return error_response(NotFound(f"there is no {clipped(request.url.path)} here"))


async def _method_not_allowed(request: Request, error: Exception) -> Response:
    response = error_response(MethodNotAllowed(f"{request.method} is not for {clipped(request.url.path)}"))
    assert isinstance(error, HTTPException)
    response.headers.update(error.headers or {})
    return response


def _describe_model(card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.name,
        "object": "model",
        "created": card.created,
        "owned_by": "tandem",
        "max_model_len": card.max_model_len,
    }


def _describe_engine(engine: KnownEngine) -> dict[str, Any]:
    described: dict[str, Any] = msgspec.to_builtins(engine.status)
    del described["type"]
    register = engine.register
    return described | {
        "version": register.version,
        "dtype": register.dtype,
        "max_model_len": register.max_model_len,
        "peer_address": str(register.peer_address),
        "http_address": str(register.http_address) if register.http_address else None,
    }
