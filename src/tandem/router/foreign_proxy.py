"""The `kv_transfer_params` by which foreign PD proxies drive engines through their own APIs."""

from __future__ import annotations

import msgspec

from tandem.errors import InvalidRequest
from tandem.wire.messages import Address, KvTransferParams, Local, Prefill, PullKv


def requested_kv(params: KvTransferParams | None) -> Local | Prefill | PullKv:
    """Return what a client's `kv_transfer_params` ask for. Raises InvalidRequest."""
    if params is None or not (params.do_remote_decode or params.do_remote_prefill):
        return Local()
    if params.do_remote_decode:
        return Prefill(published=True)
    if not (params.remote_engine_id and params.remote_host and params.remote_port and params.remote_request_id):
        raise InvalidRequest(
            "kv_transfer_params with do_remote_prefill need remote_engine_id, remote_request_id, remote_host and"
            " remote_port, as the prefill engine returned them",
            param="kv_transfer_params",
        )
    return PullKv(
        params.remote_engine_id,
        params.remote_incarnation,
        Address(params.remote_host, params.remote_port),
        params.remote_request_id,
        first_token=False,
        foreign=True,
    )


def published_params(params: KvTransferParams | None, address: Address) -> KvTransferParams | None:
    """Return an engine's parameters with its address, which its registration tells, for a foreign proxy."""
    if params is None:
        return None
    return msgspec.structs.replace(params, remote_host=address.host, remote_port=address.port)
