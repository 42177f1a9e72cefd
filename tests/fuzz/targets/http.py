"""The HTTP application, as router and as engine, over a backend that answers at once."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncGenerator
from typing import Any, Literal

from tandem.api.api_keys import ApiKeys
from tandem.api.app import create_app
from tandem.api.backend import EngineState, Health, ModelCard, TokenDelta, TokenRequest
from tandem.api.loaded_model import LoadedModel, ModelLoader
from tandem.ids import EngineIdentity
from tandem.wire.fields import MAX_TEXT
from tandem.wire.messages import TokenLogprobs
from tests.api.conftest import ListedEngine, details
from tests.fuzz.asgi import ALLOWED, call
from tests.fuzz.bodies import Bodies
from tests.fuzz.fakes import Clock, Defect, OwnErrors
from tests.fuzz.target import Target
from tests.support.families import DEMO_MODEL
from tests.support.registrations import make_register

PATHS = ["/v1/completions", "/v1/chat/completions"]
TRANSLATED = ["/v1/responses", "/v1/messages", "/tokenize", "/detokenize"]
OTHERS = [
    "/health",
    "/metrics",
    "/v1/models",
    "/v1/models/demo",
    "/tandem/engines",
    "/tandem/engine",
    "/",
    "/openapi.json",
    "/v1/\x00",
]
CARD = ModelCard("demo", str(DEMO_MODEL), 256, 1)
_LOADED: list[LoadedModel] = []


class Echo:
    """Answers with tokens of the prompt."""

    async def model(self) -> ModelCard:
        return CARD

    async def generate(self, request: TokenRequest) -> AsyncGenerator[TokenDelta, None]:
        wanted = min(request.sampling.max_tokens, 4)
        for place in range(wanted):
            token = request.token_ids[place % len(request.token_ids)]
            top = request.sampling.logprobs
            logprobs = None if top is None else [TokenLogprobs(-0.5, [(one, -1.0) for one in range(top)])]
            last = place == wanted - 1
            scores = self._scores(request) if place == 0 else None
            reason, how = ("length", details()) if last else (None, None)
            yield TokenDelta([token], logprobs, reason, details=how, prompt_logprobs=scores)

    def _scores(self, request: TokenRequest) -> list[TokenLogprobs] | None:
        top = request.sampling.prompt_logprobs
        if top is None:
            return None
        return [TokenLogprobs(-0.5, [(one, -1.0) for one in range(top)]) for _ in request.token_ids[1:]]

    def health(self) -> Health:
        return Health(True, "ready")

    def engines(self) -> list[ListedEngine]:
        register = make_register(EngineIdentity("d0", "i"), "mixed")
        return [ListedEngine(register, register.status, EngineState.READY, None)]


class HttpApi(Target):
    """Every request has an answer that is not the server's mistake; what is no error is what OpenAI's clients read."""

    NAME = "http"

    def __init__(self, rng: random.Random, clock: Clock, errors: OwnErrors) -> None:
        super().__init__(rng, clock, errors)
        backend = Echo()
        self._loader = ModelLoader(backend)
        kind: Literal["router", "engine"] = rng.choice(["router", "engine"])
        self._app = create_app(backend, self._loader, kind=kind, keys=rng.choice([None, None, None, ApiKeys("key")]))
        self._bodies = Bodies()

    async def begin(self) -> None:
        if _LOADED:
            self._loader._loaded = _LOADED[0]  # read once: it takes longer than an episode
        else:
            _LOADED.append(await self._loader.get())

    async def feed(self) -> None:
        rng = self.rng
        if rng.random() < 0.02:
            self.last = path = rng.choice(OTHERS)
            method, body, headers = rng.choice(["GET", "POST", "HEAD", "PUT", "\xff"]), b"", {}
        else:
            method, path, body = "POST", rng.choice(PATHS * 2 + TRANSLATED), self._bodies.body(rng)
            headers = self._bodies.headers(rng)
            self.last = path, headers, body
        answer = await call(self._app, method, path, body, headers)
        if answer.status not in ALLOWED:
            raise Defect(f"status {answer.status}: {answer.body[:300]!r}")
        if answer.status == 200 and path in PATHS:
            _check(answer.body)
        elif answer.status != 200 and method != "HEAD" and path in PATHS:
            error: dict[str, Any] = json.loads(answer.body)["error"]
            if len(error["message"]) > MAX_TEXT or len(error["param"] or "") > MAX_TEXT:
                raise Defect(f"an error of {len(answer.body)} bytes")


def _check(body: bytes) -> None:
    """Raise Defect unless it is one object, or events up to [DONE]; in JSON as the standard has it."""
    if not body.startswith(b"data: "):
        json.loads(body, parse_constant=_no_constant)
        return
    *events, done = [event.removeprefix("data: ") for event in body.decode().strip().split("\n\n")]
    if done != "[DONE]":
        raise Defect(f"a stream ends with {done!r}")
    for event in events:
        json.loads(event, parse_constant=_no_constant)


def _no_constant(name: str) -> None:
    raise Defect(f"{name} in JSON")
