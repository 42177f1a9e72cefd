"""A user's mistake is one readable sentence, an exit code that is not zero, and no traceback."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.deployment import run_tandem

FolderOf = Callable[[str], Path]


def said(*arguments: str | Path, environment: dict[str, str] | None = None) -> str:
    """What a command that must fail says, in one line."""
    ended = run_tandem(*arguments, environment=environment)
    assert ended.code != 0, ended.err
    assert ended.out == ""
    assert "Traceback" not in ended.err
    lines = [line for line in ended.err.splitlines() if line.startswith("tandem: ")]
    assert len(lines) == 1, ended.err
    return lines[0]


def test_a_folder_that_is_not_there() -> None:
    assert "/no/such/folder is neither a folder nor a name on the hub" in said("serve", "/no/such/folder")


def test_a_name_that_the_hub_cannot_give() -> None:
    text = said("serve", "nobody/nothing", environment={"HF_HUB_OFFLINE": "1"})
    assert "nobody/nothing is no folder here and could not be fetched from the hub" in text


def test_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    assert "has no config.json" in said("serve", tmp_path)


def test_a_model_without_weights(tmp_path: Path, folder_of: FolderOf) -> None:
    shutil.copyfile(folder_of("qwen3") / "config.json", tmp_path / "config.json")
    text = said("serve", tmp_path, "--port", "0")
    assert str(tmp_path) in text
    assert "safetensors" in text


def test_an_architecture_that_is_not_known(tmp_path: Path, folder_of: FolderOf) -> None:
    config = json.loads((folder_of("qwen3") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
    text = said("serve", tmp_path, "--port", "0")
    assert "MambaForCausalLM" in text
    assert "Qwen3ForCausalLM" in text


def test_a_port_that_is_taken(folder_of: FolderOf) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        text = said("serve", folder_of("qwen3"), "--port", port)
    assert f"127.0.0.1:{port}" in text
    assert "Choose another port" in text


def test_a_connector_that_does_not_exist(folder_of: FolderOf) -> None:
    text = said("serve", folder_of("qwen3"), "--connector", "pigeon", "--port", "0")
    for part in ("pigeon", "nixl", "tcp"):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--kv-memory", "much"], ["--kv-memory", "much", "1GiB"]),
        (["--kv-memory", "1KiB"], ["--kv-memory"]),
        (["--max-batched-tokens", "8", "--max-num-seqs", "16"], ["--max-batched-tokens (8)", "--max-num-seqs (16)"]),
        (["--decode", "0"], ["--decode", "0"]),
        (["--cluster-key-file", "/no/such/key"], ["/no/such/key", "tandem keygen"]),
        (["--prefill-tp", "5"], ["tp 5", "head"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_a_value_that_cannot_work(arguments: list[str], parts: list[str], folder_of: FolderOf) -> None:
    text = said("serve", folder_of("qwen3"), "--port", "0", *arguments)
    for part in parts:
        assert part in text


@pytest.mark.parametrize("arguments", [["--colour", "red"], ["--port", "high"], ["--dtype", "float8"]])
def test_a_flag_that_does_not_exist_or_cannot_be_read(arguments: list[str], folder_of: FolderOf) -> None:
    ended = run_tandem("serve", folder_of("qwen3"), *arguments)
    assert ended.code != 0
    said = ended.out + ended.err
    assert "Traceback" not in said
    assert arguments[0] in said


def test_a_wrong_environment_variable_is_named(folder_of: FolderOf) -> None:
    ended = run_tandem("serve", folder_of("qwen3"), environment={"TANDEM_PORT": "high"})
    assert ended.code != 0
    assert "Traceback" not in ended.out + ended.err
    assert "high" in ended.out + ended.err


def test_a_wrong_key_in_the_file_is_named(folder_of: FolderOf, tmp_path: Path) -> None:
    (tmp_path / "tandem.toml").write_text("[serve]\nprot = 8001\n")
    ended = run_tandem("serve", folder_of("qwen3"), environment={"TANDEM_CONFIG": str(tmp_path / "tandem.toml")})
    assert ended.code != 0
    assert "Traceback" not in ended.out + ended.err
    assert "prot" in ended.out + ended.err
