"""Messages between a frontend (the router, or the API on an engine) and an engine's leader.

Grouped by receiver, one tagged union for each: `ToEngine` and `ToFrontend`. A frontend binds; engines connect to it and
register. Token ids only: no prompt or output text crosses this channel. The bounds here hold for any sender that has
proved the cluster key; the engine's own limits (model length, queue) are tighter. The status of an engine is in
`engine_status.py`.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from tandem.ids import EngineIdentity
from tandem.wire.control_messages import EngineControl
from tandem.wire.engine_status import MAX_PEERS, EngineStatus
from tandem.wire.fields import Count, Name, Seconds, Text
from tandem.wire.grammar import Grammar
from tandem.wire.sampling import SamplingParams, TokenId

MAX_PROMPT_TOKENS = 4_194_304
MAX_SALT = 256
MAX_ALIASES = 64
CacheSalt = Annotated[str, Meta(min_length=1, max_length=MAX_SALT)]
Port = Annotated[int, Meta(ge=1, le=65535)]


class Address(msgspec.Struct, frozen=True, array_like=True):
    """The TCP address of a socket; `host` is a name or an IP address."""

    host: Name
    port: Port

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


# --- where a request's KV comes from and goes to ---------------------------------------------------------------


class Local(msgspec.Struct, frozen=True, tag="local"):
    """Prefill and decode on this engine."""


class Prefill(msgspec.Struct, frozen=True, tag="prefill"):
    """Compute the prompt and one token, and keep the prompt's KV for a decode engine to read.

    `published`: the client is a foreign proxy: answer with `KvTransferParams`, and expect a claim only later.
    """

    published: bool = False


class PullKv(msgspec.Struct, frozen=True, tag="pull_kv"):
    """Read the prompt's KV from a prefill engine, then decode.

    Attributes:
        engine_id, incarnation: the prefill engine; a foreign proxy may not know the incarnation.
        address: its peer socket.
        remote_request_id: the request's id on the prefill engine.
        first_token: the prefill engine samples the first token and sends it on; otherwise this engine samples it.
        foreign: the address came from a client: connect to it only in the allowed networks.
    """

    engine_id: Name
    incarnation: Name | None
    address: Address
    remote_request_id: Name
    first_token: bool = True
    foreign: bool = False


class KvTransferParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """vLLM's `kv_transfer_params` as its PD proxies carry them; opaque to the proxy."""

    do_remote_prefill: bool = False
    do_remote_decode: bool = False
    remote_engine_id: Name | None = None
    remote_incarnation: Name | None = None
    remote_request_id: Name | None = None
    remote_block_ids: list[Count] | None = None
    remote_host: Name | None = None
    remote_port: Port | None = None
    tp_size: Count | None = None


# --- received by an engine -----------------------------------------------------------------------------------


class Registered(msgspec.Struct, frozen=True, tag="registered"):
    """The answer to Register, to every heartbeat, and to Goodbye, before which all else has been received then.

    An engine that is not `known` shall register again unless it leaves. `connection`: of the last Register received.
    """

    known: bool
    connection: Count = 0


class Generate(msgspec.Struct, frozen=True, tag="generate"):
    """Start a request.

    Attributes:
        request_id: unique among the requests of its frontend; carried through every hop and log line.
        token_ids: the prompt and, if the request is resumed, the output so far.
        prompt_len: number of `token_ids` that are the client's prompt.
        time_left: seconds until the request must have ended.
        cache_salt: only requests with the same one find each other's KV in the prefix cache.
        grammar: what the output must match.
    """

    request_id: Name
    token_ids: Annotated[list[TokenId], Meta(min_length=1, max_length=MAX_PROMPT_TOKENS)]
    prompt_len: Annotated[int, Meta(ge=1)]
    sampling: SamplingParams
    time_left: Seconds
    kv: Local | Prefill | PullKv = msgspec.field(default_factory=Local)
    cache_salt: CacheSalt | None = None
    grammar: Grammar | None = None


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Drop a request; nothing more is sent about it. Unknown ids are fine."""

    request_id: Name


class PeerAddress(msgspec.Struct, frozen=True):
    """A prefill engine and its peer socket."""

    identity: EngineIdentity
    address: Address


class Introduce(msgspec.Struct, frozen=True, tag="introduce"):
    """Prefill engines that requests may name: do the handshake with them now, before a request waits for it."""

    peers: Annotated[list[PeerAddress], Meta(max_length=MAX_PEERS)]


ToEngine = Registered | Generate | Abort | Introduce | EngineControl


# --- received by a frontend -------------------------------------------------------------------------------------


class Register(msgspec.Struct, frozen=True, tag="register"):
    """The first message of an engine to a frontend, repeated until it is answered and after every reconnect.

    Attributes:
        peer_address: listens for handshakes of other engines.
        http_address: listens for its own API, if it has one.
        max_model_len: longest prompt and output together, in tokens.
        vocab_size: the token ids that it sends are below this.
        step_timeout: seconds after which it takes a step to hang, and ends.
        drain_timeout: seconds after which it ends, once it is told to drain.
        model_path: folder with the tokenizer, on the engine's node.
        model_aliases: what clients may call the model, besides its name in the status.
        protocol: lowest and highest version of the engine-to-engine protocol that it speaks.
        connection: number of times that its connection to this frontend broke; messages on their way then may be lost.
    """

    identity: EngineIdentity
    status: EngineStatus
    peer_address: Address
    max_model_len: Count
    max_waiting: Count
    model_path: Text
    dtype: Text
    version: Text
    protocol: tuple[Count, Count]
    vocab_size: Count
    step_timeout: Seconds
    drain_timeout: Seconds
    http_address: Address | None = None
    model_aliases: Annotated[list[Text], Meta(max_length=MAX_ALIASES)] = []
    connection: Count = 0


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """The log-probability of a token and the `top` most likely ones (id, natural log), most likely first.

    `rank`: of a prompt's token, its place among all; 1 is the most likely.
    """

    logprob: float
    top: list[tuple[int, float]]
    rank: Count = 0


class RequestStats(msgspec.Struct, frozen=True, omit_defaults=True):
    """Statistics of one engine's part of a response, in seconds. `kv_source`: the engine from which KV was read."""

    queue_time: Seconds = 0.0
    prefill_time: Seconds = 0.0
    transfer_time: Seconds = 0.0
    handoff_time: Seconds = 0.0
    prefix_tokens: Count = 0
    blocks: Count = 0
    bytes: Count = 0
    descriptors: Count = 0
    recomputations: Count = 0
    transport: Text | None = None
    kv_source: Text | None = None
    recompute_reason: Text | None = None


class Tokens(msgspec.Struct, frozen=True, tag="tokens"):
    """Progress of a request.

    Attributes:
        index: position of the first of `token_ids` in the request's output (0: first token).
        finish_reason: stop (eos or stop token id) or length, if the request ends with the last of `token_ids`.
        stop_token_id: the token that ended it, which is the last of `token_ids`.
        done: this engine's part is done; a prefill engine's part may end before the request does.
        stats: so far; on the first and on the last message.
        digest: of the output before `index`, as this engine knows it (`tandem.ids.output_digest`).
    """

    request_id: Name
    index: Count
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: Name | None = None
    stop_token_id: int | None = None
    done: bool = False
    stats: RequestStats | None = None
    kv_transfer_params: KvTransferParams | None = None
    digest: Count = 0


class PromptScores(msgspec.Struct, frozen=True, tag="prompt_scores"):
    """Log-probabilities of the prompt's tokens from position `start` on; the first token, 0, has none.

    They go on from each other, and come before the first token.
    """

    request_id: Name
    start: Annotated[int, Meta(ge=1)]
    logprobs: list[TokenLogprobs]


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The request ended without an answer; `code` is one of tandem.errors.REQUEST_ERRORS."""

    request_id: Name
    code: Name
    message: Text
    param: Text | None = None
    retry_after: Count | None = None
    stats: RequestStats | None = None


Output = Tokens | PromptScores | Failed


class Outputs(msgspec.Struct, frozen=True, tag="outputs"):
    """The output of one step for one frontend."""

    items: list[Output]


class Goodbye(msgspec.Struct, frozen=True, tag="goodbye"):
    """The engine stops; no message follows. `failed`: not because somebody asked for it."""

    reason: Text
    failed: bool = False


ToFrontend = Register | EngineStatus | Outputs | Goodbye
