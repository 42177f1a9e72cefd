"""POST requests that run the engines behind a router: drain one, give one another role. They have no body."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast, get_args

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tandem.api.backend import EngineOperator, KnownEngine
from tandem.api.http_errors import clipped, json_response
from tandem.errors import InvalidRequest
from tandem.wire.control_messages import Role


def operator_routes(operator: EngineOperator) -> list[Route]:
    endpoints = _OperatorEndpoints(operator)
    return [
        Route("/tandem/engines/{engine_id:path}/drain", endpoints.drain, methods=["POST"]),
        Route("/tandem/engines/{engine_id:path}/role/{role}", endpoints.change_role, methods=["POST"]),
    ]


@dataclass(frozen=True, slots=True)
class _OperatorEndpoints:
    operator: EngineOperator

    async def drain(self, request: Request) -> Response:
        engine = await self.operator.drain(request.path_params["engine_id"])
        return json_response(_identity(engine) | {"drain_timeout": engine.register.drain_timeout}, 202)

    async def change_role(self, request: Request) -> Response:
        role = request.path_params["role"]
        if role not in get_args(Role):
            raise InvalidRequest(f"a role is one of {', '.join(get_args(Role))}; got {clipped(role)!r}")
        engine = await self.operator.change_role(request.path_params["engine_id"], cast(Role, role))
        return json_response(_identity(engine) | {"role": engine.status.role})


def _identity(engine: KnownEngine) -> dict[str, object]:
    identity = engine.register.identity
    return {"engine_id": identity.engine_id, "incarnation": identity.incarnation}
