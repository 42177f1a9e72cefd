"""`tandem drain` and `tandem role`: run the engines behind a router."""

from __future__ import annotations

import asyncio
import time
from typing import Any
from urllib.parse import quote

from tandem.client import Client
from tandem.commands.listed_engines import listed_engines
from tandem.doctor.engine_pairs import ListedEngine
from tandem.errors import ConfigError, EngineFailed, EngineLost, RequestError
from tandem.wire.control_messages import Role

LOOK_SECONDS = 0.2
LAST_SECONDS = 10.0
"""Beyond its --drain-timeout, for an engine to end and for the router to notice."""


def run_drain(engine_id: str, url: str, api_key: str | None) -> int:
    """Drain an engine, and return once it is gone.

    Raises ConfigError for an engine, a URL or a key that cannot work, EngineLost if it died instead, EngineFailed if it
    is still there in the end, and what else the router says.
    """
    return asyncio.run(_drain(engine_id, url, api_key))


def run_role(engine_id: str, role: Role, url: str, api_key: str | None) -> int:
    """Change the role of an engine. Raises as `run_drain` does."""
    return asyncio.run(_change_role(engine_id, role, url, api_key))


async def _drain(engine_id: str, url: str, api_key: str | None) -> int:
    async with Client(url, api_key=api_key) as client:
        answer = await _operate(client, engine_id, "drain")
        seconds = float(answer["drain_timeout"])
        print(f"{engine_id} takes no new requests and ends within {seconds:.0f} s", flush=True)
        deadline = time.monotonic() + seconds + LAST_SECONDS
        while (engine := await _find(client, engine_id)) is not None and engine.incarnation == answer["incarnation"]:
            if engine.state == "lost":
                raise EngineLost(f"{engine_id} was lost before it had drained: {engine.reason}")
            if time.monotonic() > deadline:
                raise EngineFailed(
                    f"{engine_id} is still there {LAST_SECONDS:.0f} s after its --drain-timeout; it is {engine.state}"
                )
            await asyncio.sleep(LOOK_SECONDS)
    print(f"{engine_id} is gone")
    return 0


async def _change_role(engine_id: str, role: Role, url: str, api_key: str | None) -> int:
    async with Client(url, api_key=api_key) as client:
        answer = await _operate(client, engine_id, f"role/{role}")
    print(f"{engine_id} is a {answer['role']} engine now")
    return 0


async def _operate(client: Client, engine_id: str, what: str) -> Any:
    engines = await listed_engines(client)  # says what is wrong with a URL
    if not any(engine.engine_id == engine_id for engine in engines):
        known = ", ".join(engine.engine_id for engine in engines) or "none"
        raise ConfigError(f"{client.url} has no engine {engine_id!r}; it has {known}")
    try:
        return await client.operate(f"/tandem/engines/{quote(engine_id, safe='')}/{what}")
    except RequestError as error:
        if error.status in (401, 403):
            raise ConfigError(f"{error}; here that is TANDEM_API_KEY or --api-key") from None
        raise


async def _find(client: Client, engine_id: str) -> ListedEngine | None:
    return next((one for one in await listed_engines(client) if one.engine_id == engine_id), None)
