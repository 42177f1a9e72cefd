"""Deployments with prefill and decode apart that all clients talk to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import tandem
from tests.clients.scripted_model import write_scripted_model
from tests.support.deployment import Deployment

DEMO_MODEL = Path(tandem.__file__).parent / "demo_model"
KEYS = ("key-of-the-tests", "key-of-another")
MODEL = "scripted"
MAX_CLIENT_REQUESTS = 4


@pytest.fixture(scope="session")
def demo() -> Iterator[Deployment]:
    """The bundled model, which knows a few questions."""
    with Deployment(DEMO_MODEL, "--served-model-name", "demo") as running:
        yield running


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A model that thinks, calls tools and answers by a script, behind API keys."""
    folder = tmp_path_factory.mktemp("scripted")
    keys = folder / "keys"
    keys.write_text("\n".join(KEYS))
    model = write_scripted_model(folder / MODEL)
    limit = ("--max-client-requests", str(MAX_CLIENT_REQUESTS))
    with Deployment(model, "--api-key-file", keys, *limit) as running:
        yield running


@pytest.fixture
def url(scripted: Deployment) -> str:
    """What clients call the base URL."""
    return f"{scripted.http.url}/v1"
