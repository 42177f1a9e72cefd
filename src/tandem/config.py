"""What a person configured, as frozen sections, checked when they are made.

What is only found out later (number of blocks, end-of-sequence ids, ports) is not here.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Literal, get_args

import msgspec

from tandem.errors import ConfigError
from tandem.wire.messages import Address

Role = Literal["prefill", "decode", "mixed"]
DType = Literal["auto", "bfloat16", "float16", "float32"]
Device = Literal["auto", "cpu", "cuda"]
KvFailure = Literal["recompute", "retry", "fail"]
LogLevel = Literal["debug", "info", "warning", "error"]

MAX_TP = 1024
MAX_PP = 256
MAX_BLOCK_SIZE = 1024
MIN_LEASE_TTL = 1.0


def parse_size(text: str, flag: str) -> int:
    """Bytes from `1GiB`, `512MiB`, `2GB`, `1048576`. Raises ConfigError that names `flag`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if match is None or (match[3] and not match[2]):
        raise ConfigError(f"{flag} must be a size such as 1GiB, 512MiB or 2GB; got {text!r}")
    power = " kmgt".index(match[2] or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def parse_address(text: str, flag: str) -> Address:
    """`HOST:PORT` (an IPv6 host in brackets). Raises ConfigError that names `flag`."""
    host, colon, port = text.rpartition(":")
    host = host.strip("[]")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"{flag} must be HOST:PORT with a port from 1 to 65535; got {text!r}")
    return Address(host, int(port))


def check_port(port: int) -> None:
    if not 0 <= port < 65536:
        raise ConfigError(f"a port is from 0 (any) to 65535; got {port}")


def _positive(**values: float) -> None:
    for name, value in values.items():
        if value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be greater than 0; got {value}")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"--{name} must be one of {', '.join(choices)}; got {value!r}")


class ModelSection(msgspec.Struct, frozen=True):
    """`path`: local folder. `name`: what clients call the model. `max_model_len`: None for the model's own."""

    path: str
    name: str
    dtype: DType = "auto"
    device: Device = "auto"
    max_model_len: int | None = None

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, get_args(DType))
        _one_of("device", self.device, get_args(Device))
        if self.max_model_len is not None:
            _positive(max_model_len=self.max_model_len)


class CacheSection(msgspec.Struct, frozen=True):
    """`kv_memory`: bytes per rank for KV blocks; None: 1 GiB on CPU, 85 % of what is free on a GPU."""

    block_size: int = 16
    kv_memory: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.block_size <= MAX_BLOCK_SIZE:
            raise ConfigError(f"--block-size must be from 1 to {MAX_BLOCK_SIZE} tokens; got {self.block_size}")
        if self.kv_memory is not None:
            _positive(kv_memory=self.kv_memory)


class BatchSection(msgspec.Struct, frozen=True):
    max_num_seqs: int = 64
    max_batched_tokens: int = 2048
    max_waiting: int = 1024

    def __post_init__(self) -> None:
        _positive(
            max_num_seqs=self.max_num_seqs,
            max_batched_tokens=self.max_batched_tokens,
            max_waiting=self.max_waiting,
        )
        if self.max_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"--max-batched-tokens ({self.max_batched_tokens}) must not be less than --max-num-seqs"
                f" ({self.max_num_seqs}): a step holds one token of every running sequence"
            )


class ParallelSection(msgspec.Struct, frozen=True):
    """`master`: where node 0 waits for the others; None on a single node."""

    tp: int = 1
    pp: int = 1
    nnodes: int = 1
    node_rank: int = 0
    master: Address | None = None

    def __post_init__(self) -> None:
        _positive(tp=self.tp, pp=self.pp, nnodes=self.nnodes)
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


class NetworkSection(msgspec.Struct, frozen=True):
    """`host`: this node's address for the engine's sockets; None: found from the route to the master or router.

    `allow_peers`: networks (CIDR) into which a foreign PD proxy's `remote_host` is followed.
    """

    host: str | None = None
    port: int = 0
    router: Address | None = None
    connector: str = "nixl"
    cluster_key_file: str | None = None
    api_key: str | None = None
    allow_peers: tuple[str, ...] = ("127.0.0.0/8", "::1/128")

    def __post_init__(self) -> None:
        check_port(self.port)
        for network in self.allow_peers:
            try:
                ipaddress.ip_network(network, strict=False)
            except ValueError:
                raise ConfigError(f"--allow-peers takes networks such as 10.0.0.0/8; got {network!r}") from None
            if self.cluster_key_file is None and not ipaddress.ip_network(network, strict=False).is_loopback:
                raise ConfigError(
                    f"--allow-peers {network} leads off this machine, which needs a cluster key: make one with"
                    " `tandem keygen FILE` and give it to every process with --cluster-key-file FILE"
                )

    def allows(self, host: str) -> bool:
        """Whether a client-sent address may be followed; names are not resolved, only addresses are allowed."""
        try:
            address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
        except ValueError:
            return False
        return any(address in ipaddress.ip_network(network, strict=False) for network in self.allow_peers)


class TimeSection(msgspec.Struct, frozen=True):
    """Seconds. `lease_ttl`: how long a prefill engine keeps blocks for a reader that is not heard of."""

    start_timeout: float = 120.0
    request_timeout: float = 600.0
    lease_ttl: float = 10.0

    def __post_init__(self) -> None:
        _positive(start_timeout=self.start_timeout, request_timeout=self.request_timeout)
        if self.lease_ttl < MIN_LEASE_TTL:
            raise ConfigError(
                f"--lease-ttl must be at least {MIN_LEASE_TTL:g} s, as it is renewed three times in it over the"
                f" network; got {self.lease_ttl:g}"
            )


class EngineConfig(msgspec.Struct, frozen=True):
    role: Role
    model: ModelSection
    engine_id: str | None = None
    cache: CacheSection = CacheSection()
    batch: BatchSection = BatchSection()
    parallel: ParallelSection = ParallelSection()
    network: NetworkSection = NetworkSection()
    time: TimeSection = TimeSection()
    kv_failure: KvFailure = "recompute"
    threads: int | None = None
    seed: int | None = None
    log_level: LogLevel = "info"

    def __post_init__(self) -> None:
        _one_of("role", self.role, get_args(Role))
        _one_of("kv-failure", self.kv_failure, get_args(KvFailure))
        _one_of("log-level", self.log_level, get_args(LogLevel))


class RouterConfig(msgspec.Struct, frozen=True):
    """`control_port`: where engines register; 0 for any."""

    host: str = "127.0.0.1"
    port: int = 8000
    control_host: str = "127.0.0.1"
    control_port: int = 0
    cluster_key_file: str | None = None
    api_key: str | None = None
    request_timeout: float = 600.0
    seed: int | None = None
    log_level: LogLevel = "info"

    def __post_init__(self) -> None:
        check_port(self.port)
        check_port(self.control_port)
        _positive(request_timeout=self.request_timeout)
        _one_of("log-level", self.log_level, get_args(LogLevel))
