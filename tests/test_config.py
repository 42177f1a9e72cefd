"""What a person may configure, and how mistakes are told."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from tandem.config import (
    BatchSection,
    CacheSection,
    ClusterConfig,
    EngineConfig,
    ModelSection,
    NetworkSection,
    ParallelSection,
    RouterConfig,
    RunSection,
    TimeSection,
)
from tandem.config_access import AccessSection
from tandem.config_file import check_tables, take_config
from tandem.errors import ConfigError
from tandem.flags import parse_address, parse_size
from tandem.wire.messages import Address


@pytest.mark.parametrize(
    ("text", "size"),
    [("1GiB", 2**30), ("512MiB", 2**29), ("2GB", 2_000_000_000), ("1048576", 2**20), ("1.5 kib", 1536), ("10b", 10)],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text, "--kv-memory") == size


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "1XB", "1iB", "GiB", "1 GiB more"])
def test_what_is_no_size_is_said_with_examples(text: str) -> None:
    with pytest.raises(ConfigError, match="--kv-memory must be a size such as 1GiB"):
        parse_size(text, "--kv-memory")


def test_addresses_are_read_with_brackets_around_ipv6() -> None:
    assert parse_address("node-0:7000", "--master") == Address("node-0", 7000)
    assert parse_address("[::1]:7000", "--master") == Address("::1", 7000)


@pytest.mark.parametrize("text", ["node-0", ":7000", "node-0:", "node-0:0", "node-0:65536", "node-0:http"])
def test_what_is_no_address_is_said_with_the_flag(text: str) -> None:
    with pytest.raises(ConfigError, match="--master must be HOST:PORT"):
        parse_address(text, "--master")


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: ModelSection(dtype="int8"), "--dtype must be one of auto"),  # type: ignore[arg-type]
        (lambda: ModelSection(device="tpu"), "--device must be one of"),  # type: ignore[arg-type]
        (lambda: ModelSection(max_model_len=0), "--max-model-len must be greater than 0"),
        (lambda: CacheSection(block_size=0), "--block-size must be from 1 to 1024"),
        (lambda: CacheSection(kv_memory=0), "--kv-memory must be greater than 0"),
        (lambda: BatchSection(max_waiting=0), "--max-waiting must be greater than 0"),
        (lambda: BatchSection(max_num_seqs=9, max_batched_tokens=8), r"--max-batched-tokens \(8\)"),
        (lambda: ParallelSection(tp=0), "--tp must be at least 1; got 0"),
        (lambda: ParallelSection(tp=5000), "--tp is at most 1024"),
        (lambda: ParallelSection(node_rank=1), "--node-rank must be from 0"),
        (lambda: ParallelSection(tp=3, nnodes=2, master=Address("a", 1)), "3 ranks cannot be laid out on 2 nodes"),
        (lambda: ParallelSection(tp=2, nnodes=2), "needs --master HOST:PORT"),
        (lambda: NetworkSection(port=65536), "a port is from 0"),
        (lambda: AccessSection(allow_peers=("everywhere",)), "--allow-peers takes networks such as"),
        (lambda: AccessSection(allow_peers=("10.0.0.0/8",)), "leads off this machine, which needs a cluster key"),
        (lambda: AccessSection(cluster_key_file=Path("/no/key")), "--cluster-key-file /no/key is not a file"),
        (lambda: TimeSection(lease_ttl=0.5), "--lease-ttl must be from 1 to 3600 s"),
        (lambda: TimeSection(lease_ttl=3601), "--lease-ttl must be from 1 to 3600 s"),
        (lambda: TimeSection(lease_ttl=float("nan")), "--lease-ttl must be from 1 to 3600 s"),
        (lambda: CacheSection(max_published_kv=1.1), "--max-published-kv is a share from 0 to 1"),
        (lambda: CacheSection(max_published_kv=float("nan")), "--max-published-kv is a share from 0 to 1"),
        (lambda: TimeSection(request_timeout=-1), "--request-timeout must be greater than 0"),
        (lambda: RunSection(kv_failure="hope"), "--kv-failure must be one of recompute"),  # type: ignore[arg-type]
        (lambda: RunSection(log_level="loud"), "--log-level must be one of debug"),  # type: ignore[arg-type]
        (lambda: RouterConfig(control_port=-1), "a port is from 0"),
        (lambda: EngineConfig(role="both"), "--role must be one of"),  # type: ignore[arg-type]
        (lambda: ClusterConfig(decode=0), "--decode must be at least 1; got 0"),
        (lambda: ClusterConfig(prefill=-1), "--prefill must be 0 or more"),
        (lambda: ClusterConfig(prefill_tp=0), "--prefill-tp must be at least 1; got 0"),
        (lambda: ClusterConfig(decode_pp=1000), "--pp at most 256"),
        (lambda: ClusterConfig(decode_block_size=2000), "--block-size must be from 1 to 1024"),
        (lambda: ClusterConfig(port=65536), "a port is from 0"),
    ],
)
def test_a_value_that_cannot_work_is_refused_with_its_flag(make: Callable[[], object], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        make()


def test_ranks_are_laid_out_by_node() -> None:
    master = Address("node-0", 7000)
    nodes = [ParallelSection(2, 4, 2, node_rank, master) for node_rank in range(2)]
    assert [list(node.local_ranks) for node in nodes] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("host", "allowed"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("10.1.2.3", False), ("node-0", False), ("", False)],
)
def test_only_loopback_is_followed_by_default(host: str, allowed: bool) -> None:
    assert AccessSection().allows(host) is allowed


def test_allowed_networks_are_followed(tmp_path: Path) -> None:
    key = tmp_path / "cluster.key"
    key.touch()
    access = AccessSection(allow_peers=("10.0.0.0/8",), cluster_key_file=key)
    assert access.allows("10.200.0.1")
    assert not access.allows("127.0.0.1")


def test_a_cluster_has_prefill_and_decode_engines_of_their_own_shapes() -> None:
    config = ClusterConfig(
        prefill=2, prefill_tp=2, decode_pp=2, decode_block_size=32, connector="tcp", run=RunSection(seed=7)
    )
    engines = config.engine_configs()
    assert [(engine.name, engine.role) for engine in engines] == [
        ("prefill-0", "prefill"),
        ("prefill-1", "prefill"),
        ("decode-0", "decode"),
    ]
    assert [(engine.parallel.tp, engine.parallel.pp) for engine in engines] == [(2, 1), (2, 1), (1, 2)]
    assert [engine.cache.block_size for engine in engines] == [16, 16, 32]
    assert {engine.network.connector for engine in engines} == {"tcp"}
    assert {engine.run.seed for engine in engines} == {config.router_config().run.seed} == {7}


def test_a_cluster_without_prefill_engines_has_mixed_ones() -> None:
    assert [engine.name for engine in ClusterConfig(prefill=0, decode=2).engine_configs()] == ["mixed-0", "mixed-1"]


def test_a_config_survives_the_way_to_a_child_process() -> None:
    config = EngineConfig(parallel=ParallelSection(2, 1, 2, 1, Address("node-0", 7000)), engine_id="a")
    assert pickle.loads(pickle.dumps(config)) == config


def test_the_file_of_flags_is_taken_out_of_the_arguments(tmp_path: Path) -> None:
    file = tmp_path / "tandem.toml"
    file.write_text("[serve]\nport = 1\n")
    assert take_config(["serve", "m", "--config", str(file), "--port", "2"], {}) == (
        ["serve", "m", "--port", "2"],
        str(file),
    )
    assert take_config(["serve", f"--config={file}"], {}) == (["serve"], str(file))
    assert take_config(["serve"], {"TANDEM_CONFIG": str(file)}) == (["serve"], str(file))
    assert take_config(["serve"], {}) == (["serve"], None)


def test_a_file_of_flags_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"/nowhere\.toml is not a file"):
        take_config(["serve", "--config", "/nowhere.toml"], {})


def test_a_file_of_flags_must_be_named() -> None:
    with pytest.raises(ConfigError, match="--config needs a file after it"):
        take_config(["serve", "--config"], {})


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("port = 1\n[serve]\n", "'port' is no table of a command"),
        ("serve = 1\n", "'serve' is no table of a command"),
        ("[serv]\nport = 1\n", "'serv' is no table of a command"),
        ("[serve\n", r"TOML file with a table per command was expected"),
    ],
)
def test_what_no_command_would_read_of_the_file_is_named(tmp_path: Path, content: str, complaint: str) -> None:
    file = tmp_path / "tandem.toml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=complaint):
        check_tables(str(file), ["serve", "engine"])


def test_tables_of_commands_are_fine(tmp_path: Path) -> None:
    file = tmp_path / "tandem.toml"
    file.write_text("[serve]\nport = 1\n[engine]\n")
    check_tables(str(file), ["serve", "engine"])
