"""The `tandem` object of a response, from what both engines of a route tell of their parts."""

from __future__ import annotations

from tandem.api.backend import ServingDetails
from tandem.router.policy import Route
from tandem.wire.messages import RequestStats


def serving_details(
    route: Route, stats: dict[str, RequestStats], ttft: float, attempt: int, *, one_token: bool
) -> ServingDetails:
    """Merge the statistics of a route's engines.

    Args:
        stats: by incarnation; an engine that has not told its own yet is absent.
        ttft: seconds to the first token.
        attempt: 0 for the first; each one computes the KV again.
        one_token: the response is the first token alone. Then a decode engine that pulled KV has added nothing to it,
            whether it was quick enough to tell of that or not.
    """
    none = RequestStats()
    decode = stats.get(route.decode.incarnation, none)
    if route.prefill is not None and one_token and decode.transport is not None:
        decode = none
    prefill = stats.get(route.prefill.incarnation, none) if route.prefill is not None else decode
    pulled = decode.transport is not None
    prefix = {route.decode.engine_id: decode.prefix_tokens}
    if route.prefill is None:
        reason = decode.recompute_reason or route.reason
        recomputations = decode.recomputations
    else:
        reason = decode.recompute_reason or "it ended with the first token"
        recomputations = prefill.recomputations + decode.recomputations
        prefix[route.prefill.engine_id] = prefill.prefix_tokens
    return ServingDetails(
        prefill_engine=decode.kv_source or (route.prefill or route.decode).engine_id,
        decode_engine=route.decode.engine_id,
        disaggregated=pulled,
        reason=None if pulled else reason,
        transport=decode.transport,
        queue_time=prefill.queue_time,
        prefill_time=prefill.prefill_time,
        transfer_time=decode.transfer_time,
        handoff_time=decode.handoff_time,
        ttft=ttft,
        prefix_tokens=prefix,
        blocks=decode.blocks,
        bytes=decode.bytes,
        descriptors=decode.descriptors,
        recomputations=recomputations + attempt,
    )
