"""The bodies of requests as an OpenAPI document, made from the structs that read them, and as a page."""

from __future__ import annotations

import html
from functools import cache
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from tandem import __version__
from tandem.api.http_errors import json_response
from tandem.api.messages_api import MessagesBody
from tandem.api.openai import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from tandem.api.responses_api import ResponsesBody

POSTS: dict[str, tuple[type[msgspec.Struct], str]] = {
    "/v1/completions": (CompletionBody, "Go on with a prompt"),
    "/v1/chat/completions": (ChatBody, "Answer a conversation"),
    "/v1/responses": (ResponsesBody, "Answer a conversation (OpenAI's Responses)"),
    "/v1/messages": (MessagesBody, "Answer a conversation (Anthropic's Messages)"),
    "/tokenize": (TokenizeBody, "Text to token ids"),
    "/detokenize": (DetokenizeBody, "Token ids to text"),
}
GETS = {
    "/v1/models": "The model that is served",
    "/health": "200 if a request could be served now",
    "/ping": "The same",
    "/metrics": "Prometheus",
    "/version": "Tandem's version",
    "/load": "The number of open requests",
}


async def document(request: Request) -> Response:
    """Answer with OpenAPI 3.1."""
    return json_response(_document())


async def page(request: Request) -> Response:
    """Answer with the same for people, in one page that needs nothing from elsewhere."""
    return Response(_page(), media_type="text/html; charset=utf-8")


@cache
def _document() -> dict[str, Any]:
    kinds = [kind for kind, _ in POSTS.values()]
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    paths: dict[str, Any] = {path: {"get": _operation(summary)} for path, summary in GETS.items()}
    for (path, (_, summary)), schema in zip(POSTS.items(), schemas, strict=True):
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        paths[path] = {"post": _operation(summary) | {"requestBody": body}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tandem", "version": __version__},
        "paths": paths,
        "components": {"schemas": components},
    }


def _operation(summary: str) -> dict[str, Any]:
    return {"summary": summary, "responses": {"200": {"description": "OK"}, "default": {"description": "An error"}}}


@cache
def _page() -> str:
    parts = [f"<!doctype html><title>Tandem {__version__}</title><h1>Tandem {__version__}</h1>"]
    parts.append('<p>For programs: <a href="openapi.json">openapi.json</a>')
    parts += [f"<h2>GET {path}</h2><p>{html.escape(summary)}" for path, summary in GETS.items()]
    for path, (kind, summary) in POSTS.items():
        fields = ", ".join(f"<code>{name}</code>" for name in kind.__struct_fields__)
        parts.append(f"<h2>POST {path}</h2><p>{html.escape(summary)}<p>{fields}")
    return "\n".join(parts)
