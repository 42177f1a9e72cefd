"""Asks a running router for its engines."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import msgspec

from tandem.errors import ConfigError, StartError, WireError

FETCH_SECONDS = 10.0
MAX_BODY = 64 << 20


class PeerView(msgspec.Struct, frozen=True):
    engine_id: str
    incarnation: str
    state: str
    error: str | None = None


class RankView(msgspec.Struct, frozen=True):
    node: str = ""


class EngineView(msgspec.Struct, frozen=True):
    """An engine as GET /tandem/engines shows it. Fields that other versions may lack have defaults.

    Attributes:
        state: what the router thinks of it: ready or lost.
        peer_address: HOST:PORT where other engines shake hands with it.
    """

    engine_id: str
    incarnation: str
    role: str
    state: str = "ready"
    model: str = "?"
    fingerprint: str = "?"
    tp: int = 1
    pp: int = 1
    nnodes: int = 1
    connector: str = "?"
    dtype: str = "?"
    version: str = "?"
    peer_address: str = "?"
    ranks: list[RankView] = []
    peers: list[PeerView] = []

    @property
    def ready(self) -> bool:
        return self.state == "ready"

    @property
    def nodes(self) -> list[str]:
        return sorted({rank.node for rank in self.ranks if rank.node})


class _Listing(msgspec.Struct, frozen=True):
    engines: list[EngineView]


class _Health(msgspec.Struct, frozen=True):
    status: str = "?"
    detail: str = ""


def fetch_engines(url: str, api_key: str | None) -> list[EngineView]:
    """Raises StartError where no router answers, ConfigError for a URL or key that cannot work, WireError for another
    answer than a router's."""
    status, body = _get(url, "/tandem/engines", api_key)
    if status in (401, 403):
        raise ConfigError(f"{url} wants an API key (status {status}): give it with --api-key")
    if status == 404:
        raise ConfigError(f"{url} has no /tandem/engines: {_what_else(url, api_key)}; give the URL of a router's API")
    if status != 200:
        raise WireError(f"{url}/tandem/engines answered with status {status}: {body[:200].decode(errors='replace')}")
    try:
        return msgspec.json.decode(body, type=_Listing).engines
    except msgspec.DecodeError as error:
        raise WireError(f"{url}/tandem/engines is not what a router of this version says: {error}") from None


def fetch_health(url: str, api_key: str | None) -> str | None:
    """Why the router cannot serve a request, in its own words; None if it can, or does not say."""
    status, body = _get(url, "/health", api_key)
    if status != 503:
        return None
    try:
        return msgspec.json.decode(body, type=_Health).detail or None
    except msgspec.DecodeError:
        return None


def _what_else(url: str, api_key: str | None) -> str:
    status, _ = _get(url, "/tandem/engine", api_key)
    return "this is an engine's own API" if status in (200, 503) else "this is no Tandem router"


def _get(url: str, path: str, api_key: str | None) -> tuple[int, bytes]:
    """Status and body; `FETCH_SECONDS` for all of it."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--url must be like http://HOST:8000; got {url!r}")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    request = urllib.request.Request(url.rstrip("/") + path, headers=headers)
    try:
        with _opener().open(request, timeout=FETCH_SECONDS) as answer:
            return answer.status, _body(answer, url)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(4096)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise StartError(
            f"no router answers at {url} ({reason}): is it started, is this its API's address, is there a firewall?"
        ) from None


def _opener() -> urllib.request.OpenerDirector:
    """Without the proxies of the environment: routers are in the cluster."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _body(answer: object, url: str) -> bytes:
    deadline = time.monotonic() + FETCH_SECONDS
    body = bytearray()
    while part := answer.read1(65536):  # type: ignore[attr-defined]
        body += part
        if len(body) > MAX_BODY or time.monotonic() > deadline:
            raise WireError(f"{url} sends more than {MAX_BODY} bytes, or for more than {FETCH_SECONDS:.0f} s")
    return bytes(body)
