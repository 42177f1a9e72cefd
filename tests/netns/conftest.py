"""Everything here runs on nodes made of network namespaces; a skip is a failure where TANDEM_REQUIRE_NETNS is set."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from scripts.make_random_model import RandomModel, write_random_model

from tandem.wire.keys import new_key_file
from tests.support.nodes import why_not


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if "netns" in item.path.parts]
    reason = why_not() if here else None
    for item in here:
        item.add_marker(pytest.mark.netns)
        if reason is not None and not os.environ.get("TANDEM_REQUIRE_NETNS"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 query heads, 4 KV heads, 3 layers; with the demo model's tokenizer."""
    import tandem

    tokenizer = Path(tandem.__file__).parent / "demo_model"
    shape = RandomModel(
        family="qwen3", hidden=64, layers=3, heads=16, kv_heads=4, head_dim=16, intermediate=128, vocab=320,
        dtype="float32", seed=11,
    )  # fmt: skip
    return write_random_model(tmp_path_factory.mktemp("netns") / "random", shape, tokenizer)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in shape, other weights."""
    shape = RandomModel(
        family="qwen3", hidden=64, layers=3, heads=16, kv_heads=4, head_dim=16, intermediate=128, vocab=320,
        dtype="float32", seed=12,
    )  # fmt: skip
    return write_random_model(tmp_path_factory.mktemp("netns") / "random", shape)


@pytest.fixture(scope="session")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "cluster.key"
    new_key_file(path)
    return path
