"""How a request was served, as a response tells it."""

from __future__ import annotations

from tandem.api.backend import ServingDetails


def serving_details(disaggregated: bool, reason: str | None = None, moved: int = 0) -> ServingDetails:
    return ServingDetails(
        prefill_engine="p",
        decode_engine="d",
        disaggregated=disaggregated,
        reason=reason,
        transport="tcp" if disaggregated else None,
        queue_time=0.1,
        prefill_time=0.2,
        transfer_time=0.3,
        handoff_time=0.4,
        ttft=0.5,
        prefix_tokens={},
        blocks=1,
        bytes=moved,
        descriptors=2,
        recomputations=1,
    )
