"""The interface between the HTTP application and whatever generates the tokens."""

from __future__ import annotations

import enum
from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

import msgspec

from tandem.wire.control_messages import Role
from tandem.wire.engine_status import EngineStatus
from tandem.wire.grammar import Grammar
from tandem.wire.messages import KvTransferParams, Register, TokenLogprobs
from tandem.wire.sampling import SamplingParams


class ModelCard(msgspec.Struct, frozen=True):
    """The model that is served.

    Attributes:
        name: answers call it so.
        aliases: clients may call it so too.
        path: folder with tokenizer.json, tokenizer_config.json, generation_config.json.
        max_model_len: prompt and output together, in tokens.
        seed: for requests that bring none; None draws one for each.
    """

    name: str
    path: str
    max_model_len: int
    created: int
    seed: int | None = None
    aliases: tuple[str, ...] = ()

    def is_called(self, name: str) -> bool:
        return name == self.name or name in self.aliases


class TokenRequest(msgspec.Struct, frozen=True):
    """One sequence to generate (a request with n > 1 is n of these).

    `kv_transfer_params`: sent by a foreign PD proxy; only an engine's own API passes it on. `grammar`: what the
    output must match.
    """

    request_id: str
    token_ids: list[int]
    sampling: SamplingParams
    kv_transfer_params: KvTransferParams | None = None
    cache_salt: str | None = None
    grammar: Grammar | None = None


class ServingDetails(msgspec.Struct, frozen=True):
    """The `tandem` object of a response: how it was made. Times in seconds, sizes in bytes.

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
        prompt_logprobs: of the prompt's tokens after the first, if asked for; with the first token.
        details: how the sequence was made so far; on the first and last delta, and whenever more is known.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_token_id: int | None = None
    details: ServingDetails | None = None
    kv_transfer_params: KvTransferParams | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None


class Health(msgspec.Struct, frozen=True):
    """`ok` only when a request could be served now; `detail` says what is missing if not.

    `whole`: also as it should be, and not by decode engines alone.
    """

    ok: bool
    detail: str
    whole: bool = True


class EngineState(enum.Enum):
    READY = "ready"
    STALLED = "stalled"  # it is there, but a step of it has not ended for too long
    DRAINING = "draining"  # it finishes what it has, and ends
    LOST = "lost"


class KnownEngine(Protocol):
    """An engine that has registered: its registration, its last heartbeat, and whether it is there.

    `reason`: why it is not used for new requests; None while it is.
    """

    register: Register
    status: EngineStatus
    state: EngineState
    reason: str | None


class Backend(Protocol):
    """Generates tokens. The request router is one; tests bring another."""

    async def model(self) -> ModelCard:
        """Return the model's card. Raises Unavailable while no engine has registered."""

    def generate(self, request: TokenRequest) -> AsyncGenerator[TokenDelta, None]:
        """Yield deltas until one has a finish reason. Closing the generator early aborts the request everywhere.

        Raises a RequestError, before or between deltas; then nothing more comes.
        """

    def health(self) -> Health: ...

    def engines(self) -> Sequence[KnownEngine]:
        """Return every engine known, in the order of registration."""


class EngineOperator(Protocol):
    """Runs the engines behind a router. `engine_id`: as GET /tandem/engines shows it.

    Both return once the engine has said that it does so. They raise NotFound where there is no such engine, and
    Unavailable where it is lost or does not answer.
    """

    async def drain(self, engine_id: str) -> KnownEngine:
        """Have an engine take no new requests, finish those that it has, and end."""

    async def change_role(self, engine_id: str, role: Role) -> KnownEngine:
        """Use an engine for something else from now on; what it does now it finishes."""
