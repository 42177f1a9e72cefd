"""Everything a person can configure: frozen sections, checked when they are made.

A field is a flag: its name, default and help text are spelled here and nowhere else. The command line flattens the
sections of a command's config into its flags; from Python they are made and passed on as they are.
What is only found out later (the model's folder, the number of blocks, end-of-sequence ids, ports) is not here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from cyclopts import Parameter

from tandem.config_access import ACCESS, HTTP, LOOPBACK, AccessSection, HttpSection
from tandem.config_limits import LIMITS, LimitsSection
from tandem.errors import ConfigError
from tandem.flags import (
    ENGINES,
    MODEL,
    RUNNING,
    check_choice,
    check_counts,
    check_model_names,
    check_port,
    check_positive,
    parse_address,
    parse_size,
    text_flag,
    texts_flag,
)
from tandem.kv.lease import MAX_TTL, MIN_TTL
from tandem.wire.control_messages import Role
from tandem.wire.messages import Address

DType = Literal["auto", "bfloat16", "float16", "float32"]
Device = Literal["auto", "cpu", "cuda"]
Routing = Literal["kv-aware", "least-load"]
KvFailure = Literal["recompute", "retry", "fail"]
GenerationSource = Literal["auto", "tandem"]
ReasoningParser = Literal["auto", "none", "think"]
ToolCallParser = Literal["auto", "none", "hermes", "llama3_json", "mistral", "deepseek"]
LogLevel = Literal["debug", "info", "warning", "error"]

MAX_TP = 1024
MAX_PP = 256
MAX_BLOCK_SIZE = 1024


@Parameter(name="*", group=MODEL)
@dataclass(frozen=True, slots=True)
class ModelSection:
    served_model_name: Annotated[tuple[str, ...], Parameter(negative=(), show_default=list)] = ()
    "What clients call the model, besides MODEL as typed and its last part; answers have the first name."
    dtype: DType = "auto"
    "auto: as the model says."
    device: Device = "auto"
    max_model_len: int | None = None
    "Longest prompt and output together, in tokens; by default the model's own."

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DType)
        check_choice("device", self.device, Device)
        check_positive(max_model_len=self.max_model_len)
        check_model_names(self.served_model_name)


@Parameter(name="*", group=MODEL)
@dataclass(frozen=True, slots=True)
class CacheSection:
    block_size: int = 16
    "Tokens per KV block."
    kv_memory: Annotated[int | None, text_flag(parse_size, "--kv-memory")] = None
    "Memory for KV blocks on each rank, such as 1GiB; by default 1GiB on CPU, 85 % of what is free on a GPU."

    max_published_kv: float = 0.5
    "Share of the KV blocks that KV published to a foreign PD proxy may hold until a decode engine claims it."

    verify_kv: bool = False
    "Check the KV that is read from another engine against checksums; on both sides, or there is no hand-off."

    def __post_init__(self) -> None:
        if not 0 <= self.max_published_kv <= 1:
            raise ConfigError(f"--max-published-kv is a share from 0 to 1; got {self.max_published_kv}")
        if not 1 <= self.block_size <= MAX_BLOCK_SIZE:
            raise ConfigError(f"--block-size must be from 1 to {MAX_BLOCK_SIZE} tokens; got {self.block_size}")
        check_positive(kv_memory=self.kv_memory)


@Parameter(name="*", group=MODEL)
@dataclass(frozen=True, slots=True)
class BatchSection:
    max_num_seqs: int = 64
    "Most sequences in a step."
    max_batched_tokens: int = 2048
    "Most tokens in a step; longer prompts are computed in chunks."
    max_waiting: int = 1024
    "Most requests that wait; more are answered with 503."
    step_timeout: float = 60.0
    "Seconds after which a step is taken to hang and the engine ends; after a quarter of it the router uses others."

    def __post_init__(self) -> None:
        check_positive(max_num_seqs=self.max_num_seqs, max_batched_tokens=self.max_batched_tokens)
        check_positive(max_waiting=self.max_waiting, step_timeout=self.step_timeout)
        if self.max_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"--max-batched-tokens ({self.max_batched_tokens}) must not be less than --max-num-seqs"
                f" ({self.max_num_seqs}): a step holds one token of every running sequence"
            )


@Parameter(name="*", group=ENGINES)
@dataclass(frozen=True, slots=True)
class ParallelSection:
    tp: int = 1
    "Tensor-parallel ranks."
    pp: int = 1
    "Pipeline stages."
    nnodes: int = 1
    "Number of nodes; tp x pp ranks are laid out by node, tensor-parallel ranks fastest."
    node_rank: int = 0
    "Which of them this is, from 0."
    master: Annotated[Address | None, text_flag(parse_address, "--master")] = None
    "HOST:PORT on node 0, where the ranks meet."

    def __post_init__(self) -> None:
        check_counts(tp=self.tp, pp=self.pp, nnodes=self.nnodes)
        if self.tp > MAX_TP or self.pp > MAX_PP:
            raise ConfigError(f"--tp is at most {MAX_TP} and --pp at most {MAX_PP}; got {self.tp} and {self.pp}")
        if not 0 <= self.node_rank < self.nnodes:
            raise ConfigError(f"--node-rank must be from 0 to --nnodes - 1 ({self.nnodes - 1}); got {self.node_rank}")
        if self.world_size % self.nnodes:
            raise ConfigError(
                f"tp x pp = {self.world_size} ranks cannot be laid out on {self.nnodes} nodes evenly;"
                " choose --nnodes so that it divides tp x pp"
            )
        if self.nnodes > 1 and self.master is None:
            raise ConfigError("--nnodes greater than 1 needs --master HOST:PORT, an address of node 0")

    @property
    def world_size(self) -> int:
        return self.tp * self.pp

    @property
    def local_ranks(self) -> range:
        """Ranks of this node: by node, TP fastest."""
        per_node = self.world_size // self.nnodes
        return range(self.node_rank * per_node, (self.node_rank + 1) * per_node)


@Parameter(name="*", group=ENGINES)
@dataclass(frozen=True, slots=True)
class NetworkSection:
    connector: str | None = None
    "How KV moves: nixl or tcp; by default nixl where it is installed."
    router: Annotated[tuple[Address, ...], texts_flag(parse_address, "--router")] = ()
    "HOST:PORT of a router's control port, to register with; again for each further router."
    host: str | None = None
    "This node's address for other nodes, ranks and engines; by default found from the route to the others."
    api_host: str | None = None
    "Address of the engine's own API, on node 0; by default as --host with an API key, and loopback without one."
    port: int = 0
    "Port of the engine's own API, on node 0; 0 for any."

    def __post_init__(self) -> None:
        check_port(self.port)


@Parameter(name="*", group=RUNNING)
@dataclass(frozen=True, slots=True)
class TimeSection:
    start_timeout: float = 120.0
    "Seconds within which everything must have started."
    request_timeout: float = 600.0
    "Seconds within which a request must end."
    route_timeout: float = 120.0
    "Seconds for which a request waits for engines when all that were there are gone."
    lease_ttl: float = 10.0
    "Seconds for which a prefill engine keeps KV for a decode engine that it does not hear of."

    def __post_init__(self) -> None:
        check_positive(start_timeout=self.start_timeout)
        check_positive(request_timeout=self.request_timeout, route_timeout=self.route_timeout)
        if not MIN_TTL <= self.lease_ttl <= MAX_TTL:
            raise ConfigError(
                f"--lease-ttl must be from {MIN_TTL:g} to {MAX_TTL:g} s: a lease is renewed three times in it over the"
                f" network, and a peer that is gone is noticed after it; got {self.lease_ttl:g}"
            )


@Parameter(name="*", group=RUNNING)
@dataclass(frozen=True, slots=True)
class RunSection:
    kv_failure: KvFailure = "recompute"
    "What becomes of a request whose KV is lost on the way."
    threads: int | None = None
    "CPU threads per rank; by default the cores of this machine over the ranks of the engine."
    seed: int | None = None
    "For requests that bring no seed."
    generation_config: GenerationSource = "auto"
    "Sampling of requests that say nothing: auto as the model's generation_config.json says, tandem as OpenAI's API."
    tool_call_parser: ToolCallParser = "auto"
    "How the model writes tool calls: auto as its chat template shows, none for no tools unless a call is required."
    reasoning_parser: ReasoningParser = "auto"
    "Whether answers begin with reasoning between <think> and </think>: auto as the chat template shows."
    log_level: LogLevel = "info"

    def __post_init__(self) -> None:
        check_choice("kv_failure", self.kv_failure, KvFailure)
        check_choice("generation_config", self.generation_config, GenerationSource)
        check_choice("tool_call_parser", self.tool_call_parser, ToolCallParser)
        check_choice("reasoning_parser", self.reasoning_parser, ReasoningParser)
        check_choice("log_level", self.log_level, LogLevel)


@Parameter(name="*", group=ENGINES)
@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The flags of `tandem engine`: one node's share of an engine."""

    role: Role = "mixed"
    "What the router uses it for; sent a request directly, an engine of any role answers by itself."
    parallel: ParallelSection = ParallelSection()
    engine_id: str | None = None
    "Names the engine over restarts; by default a fresh one. Must be the same on all nodes."
    drain_timeout: float = 30.0
    "Seconds for which an engine that gets SIGTERM finishes its requests and lets its KV be read, before it ends."
    network: NetworkSection = NetworkSection()
    model: ModelSection = ModelSection()
    cache: CacheSection = CacheSection()
    batch: BatchSection = BatchSection()
    access: AccessSection = ACCESS
    http: HttpSection = HTTP
    limits: LimitsSection = LIMITS
    time: TimeSection = TimeSection()
    run: RunSection = RunSection()

    def __post_init__(self) -> None:
        check_choice("role", self.role, Role)
        check_positive(drain_timeout=self.drain_timeout)

    @property
    def name(self) -> str:
        """How log lines and messages on this machine call the engine."""
        return self.engine_id or self.role


@Parameter(name="*", group=ENGINES)
@dataclass(frozen=True, slots=True)
class RouterConfig:
    """The flags of `tandem router`. An engine's own API is a router with one engine behind it."""

    host: str = LOOPBACK
    "Address of the OpenAI API."
    port: int = 8000
    "Port of the OpenAI API; 0 for any."
    control_host: str | None = None
    "Address of the control port; by default as --host."
    control_port: int = 7000
    "Port where engines register; 0 for any."
    routing: Routing = "kv-aware"
    "kv-aware: a request goes where the beginning of its prompt is cached, weighed against load."
    access: AccessSection = ACCESS
    http: HttpSection = HTTP
    limits: LimitsSection = LIMITS
    time: TimeSection = TimeSection()
    run: RunSection = RunSection()

    def __post_init__(self) -> None:
        check_port(self.port)
        check_port(self.control_port)
        check_choice("routing", self.routing, Routing)


@Parameter(name="*", group=ENGINES)
@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """The flags of `tandem serve`: a router and engines on this machine."""

    host: str = LOOPBACK
    "Address of the OpenAI API."
    port: int = 8000
    "Port of the OpenAI API; 0 for any."
    prefill: int = 1
    "Number of prefill engines; 0 for engines that do both (as many as --decode says)."
    prefill_tp: int = 1
    "Tensor-parallel ranks of each prefill engine."
    prefill_pp: int = 1
    "Pipeline stages of each prefill engine."
    decode: int = 1
    "Number of decode engines."
    decode_tp: int = 1
    "Tensor-parallel ranks of each decode engine."
    decode_pp: int = 1
    "Pipeline stages of each decode engine."
    prefill_block_size: int | None = None
    "Tokens per KV block on prefill engines, if not as --block-size."
    decode_block_size: int | None = None
    "Tokens per KV block on decode engines, if not as --block-size."
    connector: str | None = None
    "How KV moves: nixl or tcp; by default nixl where it is installed."
    routing: Routing = "kv-aware"
    "kv-aware: a request goes where the beginning of its prompt is cached, weighed against load."
    model: ModelSection = ModelSection()
    cache: CacheSection = CacheSection()
    batch: BatchSection = BatchSection()
    access: AccessSection = ACCESS
    http: HttpSection = HTTP
    limits: LimitsSection = LIMITS
    time: TimeSection = TimeSection()
    run: RunSection = RunSection()

    def __post_init__(self) -> None:
        check_counts(prefill_tp=self.prefill_tp, prefill_pp=self.prefill_pp)
        check_counts(decode=self.decode, decode_tp=self.decode_tp, decode_pp=self.decode_pp)
        if self.prefill < 0:
            raise ConfigError(f"--prefill must be 0 or more; got {self.prefill}")
        self.router_config()  # their sections check themselves when they are made
        self.engine_configs()

    def router_config(self) -> RouterConfig:
        shared = self.access, self.http, self.limits, self.time, self.run
        return RouterConfig(self.host, self.port, LOOPBACK, 0, self.routing, *shared)

    def engine_configs(self) -> list[EngineConfig]:
        """Return the config of each engine, prefill engines first."""
        last: Role = "decode" if self.prefill else "mixed"
        prefill = ParallelSection(self.prefill_tp, self.prefill_pp)
        decode = ParallelSection(self.decode_tp, self.decode_pp)
        return [
            *(self._engine("prefill", i, prefill, self.prefill_block_size) for i in range(self.prefill)),
            *(self._engine(last, i, decode, self.decode_block_size) for i in range(self.decode)),
        ]

    def _engine(self, role: Role, index: int, parallel: ParallelSection, block_size: int | None) -> EngineConfig:
        return EngineConfig(
            role=role,
            parallel=parallel,
            engine_id=f"{role}-{index}",
            network=NetworkSection(self.connector),
            model=self.model,
            cache=self.cache if block_size is None else replace(self.cache, block_size=block_size),
            batch=self.batch,
            access=self.access,
            http=self.http,
            limits=self.limits,
            time=self.time,
            run=self.run,
        )
