"""Flags, environment variables and TOML keys become the config of a command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cyclopts import App
from cyclopts.config import Toml

from tandem import cli
from tandem.commands.doctor_options import DoctorOptions
from tandem.commands.workload import Slo, Workload
from tandem.config import (
    CacheSection,
    ClusterConfig,
    EngineConfig,
    ModelSection,
    NetworkSection,
    ParallelSection,
    RouterConfig,
    RunSection,
)
from tandem.config_access import AccessSection
from tandem.errors import ConfigError
from tandem.wire.messages import Address


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> App:
    """The command line; what a test changes in it is undone."""
    monkeypatch.setattr(cli.app, "config", cli.app.config)
    return cli.app


def arguments(app: App, *words: str) -> dict[str, Any]:
    """What a command is called with."""
    _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    return dict(bound.arguments)


def test_flags_of_serve_reach_their_sections(app: App) -> None:
    flags = ["--prefill-tp", "2", "--kv-memory", "1MiB", "--served-model-name", "m", "--log-level", "debug"]
    assert arguments(app, "serve", "folder", *flags, "--allow-peers", "127.0.0.1", "--allow-peers", "::1") == {
        "model": "folder",
        "config": ClusterConfig(
            prefill_tp=2,
            model=ModelSection(served_model_name=("m",)),
            cache=CacheSection(kv_memory=2**20),
            access=AccessSection(allow_peers=("127.0.0.1", "::1")),
            run=RunSection(log_level="debug"),
        ),
    }


def test_flags_of_an_engine_reach_their_sections(app: App) -> None:
    flags = ["--role", "decode", "--tp", "2", "--nnodes", "2", "--master", "node-0:7001", "--router", "[::1]:7000"]
    assert arguments(app, "engine", "folder", *flags)["config"] == EngineConfig(
        role="decode",
        parallel=ParallelSection(tp=2, nnodes=2, master=Address("node-0", 7001)),
        network=NetworkSection(router=(Address("::1", 7000),)),
    )


@pytest.mark.parametrize(
    "words", [["--router", "node-0:7000", "--router", "[::1]:7001"], ["--router=node-0:7000,[::1]:7001"]]
)
def test_an_engine_may_have_several_routers(app: App, words: list[str]) -> None:
    routers = (Address("node-0", 7000), Address("::1", 7001))
    assert arguments(app, "engine", "folder", *words)["config"].network.router == routers


@pytest.mark.parametrize(
    ("text", "routers"),
    [
        ('"node-0:7000"', (Address("node-0", 7000),)),
        ('["node-0:7000", "[::1]:7001", "node-0:7000"]', (Address("node-0", 7000), Address("::1", 7001))),
    ],
)
def test_routers_stand_in_a_file_and_in_the_environment(
    app: App, text: str, routers: tuple[Address, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tandem.toml"
    file.write_text(f"[engine]\nrouter = {text}\n")
    app.config = [*app.config, Toml(file)]
    assert arguments(app, "engine", "folder")["config"].network.router == routers
    monkeypatch.setenv("TANDEM_ROUTER", "a:1,b:2")
    assert arguments(app, "engine", "folder")["config"].network.router == (Address("a", 1), Address("b", 2))


def test_flags_of_a_router_reach_their_sections(app: App) -> None:
    assert arguments(app, "router", "--control-port", "0", "--seed", "3")["config"] == RouterConfig(
        control_port=0, run=RunSection(seed=3)
    )


def test_goals_of_a_benchmark_are_milliseconds(app: App) -> None:
    found = arguments(app, "bench", "--ttft-goal", "250", "--num-prompts", "3", "--json", "found.json")
    assert found == {"workload": Workload(num_prompts=3, slo=Slo(ttft=0.25)), "json": Path("found.json")}


def test_flags_of_doctor_are_its_options(app: App) -> None:
    assert arguments(app, "doctor", "--master", "node-0:7001", "--nnodes", "2")["options"] == DoctorOptions(
        master=Address("node-0", 7001), nnodes=2
    )


@pytest.mark.parametrize("command", ["serve", "engine"])
def test_every_default_is_that_of_the_config(app: App, command: str) -> None:
    assert arguments(app, command, "folder") == {"model": "folder"}


def test_environment_variables_are_flags(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_KV_MEMORY", "1MiB")
    monkeypatch.setenv("TANDEM_MASTER", "node-0:7001")
    monkeypatch.setenv("TANDEM_ALLOW_PEERS", "127.0.0.1 ::1")
    assert arguments(app, "engine", "folder")["config"] == EngineConfig(
        parallel=ParallelSection(master=Address("node-0", 7001)),
        cache=CacheSection(kv_memory=2**20),
        access=AccessSection(allow_peers=("127.0.0.1", "::1")),
    )


def test_keys_of_a_file_are_flags_and_flags_go_before_it(app: App, tmp_path: Path) -> None:
    file = tmp_path / "tandem.toml"
    file.write_text('[serve]\nport = 1\nprefill = 2\nkv_memory = "1MiB"\nallow-peers = ["127.0.0.1"]\n')
    app.config = [*app.config, Toml(file)]
    assert arguments(app, "serve", "folder", "--port", "2")["config"] == ClusterConfig(
        port=2,
        prefill=2,
        cache=CacheSection(kv_memory=2**20),
        access=AccessSection(allow_peers=("127.0.0.1",)),
    )


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["serve", "m", "--kv-memory", "much"], "--kv-memory must be a size such as 1GiB"),
        (["serve", "m", "--prefill-tp", "0"], "--prefill-tp must be at least 1; got 0"),
        (["engine", "m", "--master", "node-0"], "--master must be HOST:PORT"),
        (["engine", "m", "--router", "node-0:0"], "--router must be HOST:PORT"),
        (["engine", "m", "--router", "node-0:1,"], "--router must be HOST:PORT .*; got ''"),
        (["bench", "--warmup", "-1"], "--warmup must be 0 or more"),
        (["doctor", "--nnodes", "0"], "--nnodes must be at least 1; got 0"),
        (["doctor", "--master", "node-0"], "--master must be HOST:PORT"),
    ],
)
def test_a_wrong_value_is_named_by_its_flag(app: App, words: list[str], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        arguments(app, *words)


def test_a_wrong_environment_variable_is_named_by_its_flag(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_MASTER", "node-0")
    with pytest.raises(ConfigError, match="--master must be HOST:PORT"):
        arguments(app, "engine", "folder")
