"""The options of the connector, from `kv_connector_extra_config`: checked at start, unknown ones refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from tandem.config_access import LOOPBACK, AccessSection
from tandem.errors import ConfigError
from tandem.kv.lease import MAX_TTL, MIN_TTL
from tandem.transfer.transports.registry import connector_name

GIB = 1 << 30


class ConnectorOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a person may say of the connector.

    Attributes:
        connector: nixl or tcp; None for nixl where it is installed.
        host: address at which decode engines reach this one; also bound.
        port: of the prefill side; 0 for any that is free.
        cluster_key_file: as of `tandem serve`; without one only loopback is used.
        arena_gib: memory in GiB that each worker keeps for KV on its way.
        lease_ttl: seconds for which a reader's lease lasts without renewal.
        allow_peers: networks into which the `remote_host` of a request is followed.
    """

    connector: str | None = None
    host: str = LOOPBACK
    port: Annotated[int, Meta(ge=0, lt=65536)] = 0
    cluster_key_file: str | None = None
    arena_gib: Annotated[float, Meta(gt=0, le=1 << 16)] = 1.0
    lease_ttl: Annotated[float, Meta(ge=MIN_TTL, le=MAX_TTL)] = 10.0
    allow_peers: tuple[str, ...] = ("127.0.0.0/8", "::1/128")

    @property
    def access(self) -> AccessSection:
        """Who may come in, and where requests may lead. Raises ConfigError."""
        key = Path(self.cluster_key_file).expanduser() if self.cluster_key_file is not None else None
        return AccessSection(key, self.allow_peers)

    @property
    def arena_bytes(self) -> int:
        return int(self.arena_gib * GIB)


def parse_options(extra_config: Mapping[str, Any]) -> ConnectorOptions:
    """Return the options. Raises ConfigError that names what is wrong, and what there is."""
    try:
        options = msgspec.convert(dict(extra_config), ConnectorOptions)
    except msgspec.ValidationError as error:
        known = ", ".join(ConnectorOptions.__struct_fields__)
        raise ConfigError(f"kv_connector_extra_config: {error}; the options of TandemConnector are {known}") from None
    connector_name(options.connector)
    _ = options.access
    return options
