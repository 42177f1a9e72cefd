"""What commands ask a router about its engines."""

from __future__ import annotations

import msgspec

from tandem.client import Client
from tandem.doctor.engine_pairs import ListedEngine
from tandem.errors import ConfigError, RequestError, Unavailable, WireError


async def listed_engines(client: Client) -> list[ListedEngine]:
    """Ask a router for its engines.

    Raises ConfigError for a URL or key that cannot work, WireError for another answer than a router's, Unavailable.
    """
    path = "/tandem/engines"
    try:
        return msgspec.convert((await client.get(path))["engines"], list[ListedEngine])
    except RequestError as error:
        if error.status in (401, 403):
            raise ConfigError(
                f"{client.url} wants an API key (status {error.status}): give it with --api-key"
            ) from None
        if error.status == 404:
            raise ConfigError(
                f"{client.url} has no {path}: {await _kind(client)}; give the URL of a router's API"
            ) from None
        if isinstance(error, Unavailable):
            raise
        raise WireError(f"{client.url}{path}: {error}") from None
    except (msgspec.ValidationError, LookupError, TypeError) as error:
        raise WireError(f"{client.url}{path} is not what a router of this version says: {error}") from None


async def _kind(client: Client) -> str:
    try:
        await client.get("/tandem/engine")
    except RequestError as error:
        if error.status != 503:
            return "this is no Tandem router"
    return "this is an engine's own API"
