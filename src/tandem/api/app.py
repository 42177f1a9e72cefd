"""The OpenAI-compatible HTTP application; the router and every engine have one."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route

from tandem.api.backend import Backend, ModelCard
from tandem.api.chat import ChatBuilder, prepare_chat
from tandem.api.completions import CompletionBuilder, prepare_completion
from tandem.api.endpoint import GenerateEndpoint
from tandem.api.http_errors import MethodNotAllowed, ModelNotFound, NotFound, error_response, json_response, unexpected
from tandem.api.loaded_model import ModelLoader
from tandem.api.metrics import CONTENT_TYPE, Metrics
from tandem.api.middleware import ApiMiddleware
from tandem.api.openai import ChatBody, CompletionBody
from tandem.api.prepared_request import Kind
from tandem.errors import ConfigError, RequestError, Unavailable

MAX_BODY_BYTES = 64 * 2**20

log = logging.getLogger(__name__)


def create_app(backend: Backend, *, kind: Kind, api_key: str | None = None, max_body: int = MAX_BODY_BYTES) -> FastAPI:
    """The application in front of `backend`.

    Args:
        kind: "router" has /tandem/engines and refuses kv_transfer_params; "engine" has /tandem/engine.
        api_key: what clients must bring for /v1/; None for no key.
        max_body: bytes of the largest body that is read.

    Raises ConfigError for an API key that no client could send.
    """
    if api_key is not None and (not api_key or api_key != api_key.strip()):
        raise ConfigError("the API key is empty, or has spaces around it; give another, or none for no key")
    app = FastAPI(title="Tandem", openapi_url=None, docs_url=None, redoc_url=None)
    app.state.loader = loader = ModelLoader(backend)
    metrics = Metrics(backend)
    around = (backend, loader, metrics, kind, max_body)
    completions = GenerateEndpoint("completions", CompletionBody, prepare_completion, CompletionBuilder, *around)
    chat = GenerateEndpoint("chat", ChatBody, prepare_chat, ChatBuilder, *around)
    app.router.routes.append(Route("/v1/completions", completions, methods=["POST"]))
    app.router.routes.append(Route("/v1/chat/completions", chat, methods=["POST"]))
    _add_models(app, backend)
    _add_health(app, backend, metrics)
    _add_engines(app, backend, kind)
    _add_errors(app)
    app.add_middleware(ApiMiddleware, api_key=api_key)
    return app


async def preload(app: FastAPI) -> None:
    """Loads the model's tokenizer and template now, so that the first request need not wait for them.

    Raises Unavailable while the backend knows no model; RequestError if the model's folder cannot be used.
    """
    loader: ModelLoader = app.state.loader
    await loader.get()


def _add_models(app: FastAPI, backend: Backend) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [_model(await backend.model())]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        card = await backend.model()
        if name != card.name:
            raise ModelNotFound(f"there is no model {name!r} here; it is {card.name!r}", param="model")
        return json_response(_model(card))


def _add_health(app: FastAPI, backend: Backend, metrics: Metrics) -> None:
    @app.get("/health")
    async def health() -> Response:
        found = backend.health()
        return json_response(
            {"status": "ok" if found.ok else "unavailable", "detail": found.detail}, 200 if found.ok else 503
        )

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.expose(), headers={"content-type": CONTENT_TYPE})


def _add_engines(app: FastAPI, backend: Backend, kind: Kind) -> None:
    if kind == "router":

        @app.get("/tandem/engines")
        async def engines() -> Response:
            known = [backend.describe_engine(status) | {"state": state} for status, state in backend.engines()]
            return json_response({"engines": known})

    else:

        @app.get("/tandem/engine")
        async def engine() -> Response:
            known = backend.engines()
            if not known:
                raise Unavailable("the engine has not started yet")
            return json_response(backend.describe_engine(known[0][0]))


def _add_errors(app: FastAPI) -> None:
    async def of_ours(request: Request, error: Exception) -> Response:
        return error_response(error if isinstance(error, RequestError) else unexpected())

    async def of_routing(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        headers: Any = getattr(error, "headers", None) or {}
        if status == 405:
            response = error_response(MethodNotAllowed(f"{request.method} is not for {request.url.path}"))
        elif status == 404:
            response = error_response(NotFound(f"there is no {request.url.path} here"))
        else:
            response = error_response(unexpected())
        response.headers.update(headers)
        return response

    app.add_exception_handler(RequestError, of_ours)
    app.add_exception_handler(HTTPException, of_routing)
    app.add_exception_handler(Exception, of_ours)


def _model(card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.name,
        "object": "model",
        "created": card.created,
        "owned_by": "tandem",
        "max_model_len": card.max_model_len,
    }
