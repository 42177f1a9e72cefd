"""The flags of the commands, as groups; each makes a section of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from tandem.config import (
    BatchSection,
    CacheSection,
    Device,
    DType,
    EngineConfig,
    KvFailure,
    LogLevel,
    ModelSection,
    NetworkSection,
    ParallelSection,
    Role,
    TimeSection,
    parse_address,
    parse_size,
)
from tandem.errors import ConfigError
from tandem.wire.messages import Address

MODEL = Group("Model and memory", sort_key=2)
NETWORK = Group("Network and security", sort_key=3)
RUN = Group("Running", sort_key=4)


@Parameter(name="*", group=MODEL)
@dataclass(frozen=True)
class ModelOptions:
    served_name: Annotated[str | None, Parameter(name="--served-model-name")] = None
    "What clients call the model; by default the folder's or the hub's name."
    dtype: DType = "auto"
    "auto: as the model says."
    device: Device = "auto"
    max_model_len: int | None = None
    "Longest prompt and output together, in tokens; by default the model's own."
    block_size: int = 16
    "Tokens per KV block."
    kv_memory: str | None = None
    "Memory for KV blocks on each rank, such as 1GiB; by default 1GiB on CPU, 85 % of what is free on a GPU."
    max_num_seqs: int = 64
    "Most sequences in a step."
    max_batched_tokens: int = 2048
    "Most tokens in a step; longer prompts are computed in chunks."
    max_waiting: int = 1024
    "Most requests that wait; more are answered with 503."

    def model(self, path: Path, name: str) -> ModelSection:
        return ModelSection(str(path), self.served_name or name, self.dtype, self.device, self.max_model_len)

    def cache(self) -> CacheSection:
        return CacheSection(self.block_size, parse_size(self.kv_memory, "--kv-memory") if self.kv_memory else None)

    def batch(self) -> BatchSection:
        return BatchSection(self.max_num_seqs, self.max_batched_tokens, self.max_waiting)


@Parameter(name="*", group=NETWORK)
@dataclass(frozen=True)
class NetworkOptions:
    api_key: str | None = None
    "Clients of /v1 must send it as a bearer token."
    cluster_key_file: Path | None = None
    "Key of the cluster, made by `tandem keygen`; without one only loopback is used."
    allow_peers: Annotated[list[str], Parameter(negative=())] = field(
        default_factory=lambda: ["127.0.0.0/8", "::1/128"]
    )
    "Networks into which the remote_host of a foreign PD proxy is followed."

    def key_file(self) -> str | None:
        if self.cluster_key_file is None:
            return None
        if not self.cluster_key_file.is_file():
            raise ConfigError(
                f"--cluster-key-file {self.cluster_key_file} is not a file; make one with `tandem keygen FILE`"
            )
        return str(self.cluster_key_file.resolve())


@Parameter(name="*", group=RUN)
@dataclass(frozen=True)
class RunOptions:
    start_timeout: float = 120.0
    "Seconds within which everything must have started."
    request_timeout: float = 600.0
    "Seconds within which a request must end."
    lease_ttl: float = 10.0
    "Seconds for which a prefill engine keeps KV for a decode engine that it does not hear of."
    kv_failure: KvFailure = "recompute"
    "What becomes of a request whose KV is lost on the way."
    threads: int | None = None
    "CPU threads per rank; by default the cores of this machine over the ranks of the engine."
    seed: int | None = None
    "For requests that bring no seed."
    log_level: LogLevel = "info"

    def time(self) -> TimeSection:
        return TimeSection(self.start_timeout, self.request_timeout, self.lease_ttl)


def engine_config(
    role: Role,
    model: ModelSection,
    options: ModelOptions,
    network: NetworkOptions,
    run: RunOptions,
    parallel: ParallelSection,
    *,
    connector: str,
    engine_id: str | None = None,
    host: str | None = None,
    port: int = 0,
    router: Address | None = None,
) -> EngineConfig:
    return EngineConfig(
        role=role,
        model=model,
        engine_id=engine_id,
        cache=options.cache(),
        batch=options.batch(),
        parallel=parallel,
        network=NetworkSection(
            host, port, router, connector, network.key_file(), network.api_key, tuple(network.allow_peers)
        ),
        time=run.time(),
        kv_failure=run.kv_failure,
        threads=run.threads,
        seed=run.seed,
        log_level=run.log_level,
    )


def optional_address(text: str | None, flag: str) -> Address | None:
    return None if text is None else parse_address(text, flag)
