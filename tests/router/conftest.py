from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.router.running_router import RunningRouter, running_router


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def router(anyio_backend: str) -> AsyncIterator[RunningRouter]:
    async with running_router() as running:
        yield running
