"""What the HTTP application needs of whatever generates the tokens. The router is one; tests bring another."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Protocol

import msgspec

from tandem.wire.messages import EngineStatus, KvTransferParams, TokenLogprobs
from tandem.wire.sampling import SamplingParams


class ModelCard(msgspec.Struct, frozen=True):
    """The model that is served.

    Attributes:
        name: what clients call it.
        path: folder with tokenizer.json, tokenizer_config.json, generation_config.json.
        max_model_len: prompt and output together, in tokens.
        seed: for requests that bring none; None draws one for each.
    """

    name: str
    path: str
    max_model_len: int
    created: int
    seed: int | None = None


class TokenRequest(msgspec.Struct, frozen=True):
    """One sequence to generate (a request with n > 1 is n of these).

    `kv_transfer_params`: what a foreign PD proxy sent; only an engine's own API passes it on.
    """

    request_id: str
    token_ids: list[int]
    sampling: SamplingParams
    kv_transfer_params: KvTransferParams | None = None


class ServingDetails(msgspec.Struct, frozen=True, omit_defaults=False):
    """The `tandem` object of a response. Times in seconds, sizes in bytes.

    Attributes:
        disaggregated: whether another engine's prefill was used; if not, `reason` says why.
        recomputations: how often this request's KV was computed again (lost, late or preempted).
    """

    prefill_engine: str | None
    decode_engine: str | None
    disaggregated: bool
    reason: str | None
    transport: str | None
    queue_time: float
    prefill_time: float
    transfer_time: float
    handoff_time: float
    ttft: float
    prefix_tokens: dict[str, int]
    blocks: int
    bytes: int
    descriptors: int
    recomputations: int


class TokenDelta(msgspec.Struct, frozen=True):
    """The next tokens of a sequence, in order. The last delta has a finish reason.

    Attributes:
        finish_reason: "stop" (eos or stop token id, which is then the last of `token_ids` and `stop_token_id`),
            "length", or None.
        how: how it was made so far; on the first and last delta, and whenever more is known.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_token_id: int | None = None
    how: ServingDetails | None = None
    kv_transfer_params: KvTransferParams | None = None


class Health(msgspec.Struct, frozen=True):
    """`ok` only when a request could be served now; `detail` says what is missing if not."""

    ok: bool
    detail: str


class Backend(Protocol):
    async def model(self) -> ModelCard:
        """The model; raises Unavailable while no engine has registered."""

    def generate(self, request: TokenRequest) -> AsyncGenerator[TokenDelta, None]:
        """Deltas until one has a finish reason. Closing the generator early aborts the request everywhere.

        Raises a RequestError, before or between deltas; then nothing more comes.
        """

    def health(self) -> Health: ...

    def engines(self) -> list[tuple[EngineStatus, str]]:
        """Every engine known, with its state: ready, lost or leaving."""

    def describe_engine(self, status: EngineStatus) -> dict[str, Any]:
        """What /tandem/engine shows of it."""
