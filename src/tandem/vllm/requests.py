"""What a request's `kv_transfer_params` ask of the connector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from tandem.config_access import AccessSection
from tandem.wire.fields import Name
from tandem.wire.messages import Address, KvTransferParams, PullKv


class TransferParams(KvTransferParams, frozen=True, kw_only=True, omit_defaults=True):
    """As proxies for vLLM carry them. `transfer_id`: names the hand-off where both engines are asked at once."""

    transfer_id: Name | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """No hand-off for this request, and why; it is computed where it is."""

    reason: str


@dataclass(frozen=True, slots=True)
class ExportKv:
    """Offer the KV of the prompt under this name. `published`: a proxy passes the name on once the prompt is done."""

    remote_id: str
    published: bool


def read_params(
    params: Mapping[str, Any], request_id: str, access: AccessSection
) -> ExportKv | PullKv | Refused | None:
    """Return what is asked; None for nothing."""
    try:
        asked = msgspec.convert(dict(params), TransferParams)
    except msgspec.ValidationError as error:
        return Refused(f"kv_transfer_params: {error}")
    if asked.do_remote_decode:
        return ExportKv(asked.transfer_id or request_id, published=asked.transfer_id is None)
    if not asked.do_remote_prefill:
        return None
    remote_id = asked.transfer_id or asked.remote_request_id
    if not (asked.remote_engine_id and asked.remote_host and asked.remote_port and remote_id):
        return Refused(
            "kv_transfer_params with do_remote_prefill need remote_engine_id, remote_host, remote_port, and"
            " remote_request_id or transfer_id"
        )
    if not access.allows(asked.remote_host):
        return Refused(f"remote_host {asked.remote_host} is not within allow_peers of this engine")
    return PullKv(
        asked.remote_engine_id,
        asked.remote_incarnation,
        Address(asked.remote_host, asked.remote_port),
        remote_id,
        first_token=False,
        foreign=asked.transfer_id is None,
    )
