"""Engines compute under the OpenMP runtime that was chosen for them, say so, and leave nothing of it behind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tandem.openmp import installed_runtime
from tests.support.deployment import Deployment, flags
from tests.support.families import prompt_of
from tests.support.reference import Reference

SHARED_MEMORY = Path("/dev/shm")
FLAGS = flags(prefill=0, kv_memory="16MiB", threads=2)
PROMPT = prompt_of(90)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def the_rank(deployment: Deployment) -> dict[str, Any]:
    [engine] = deployment.engines().values()
    [rank] = engine["ranks"]
    told = deployment.engine(engine["engine_id"]).get("/tandem/engine").json
    assert told["ranks"] == [rank]
    found: dict[str, Any] = rank
    return found


def mapped(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def thread_names(pid: int) -> list[str]:
    return [(task / "comm").read_text().strip() for task in Path(f"/proc/{pid}/task").iterdir()]


@pytest.mark.skipif(installed_runtime() is None, reason="Intel's runtime is for x86 alone")
def test_an_engine_runs_under_intels_runtime(
    folder_of: Callable[[str], Path], reference_of: Callable[[str], Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = set(SHARED_MEMORY.iterdir())
    with Deployment(folder_of("qwen3"), *FLAGS) as deployment:
        rank = the_rank(deployment)
        assert (rank["openmp"], rank["threads"]) == ("libiomp5.so", 2)
        assert "libiomp5.so" in mapped(rank["pid"])
        assert "openmp_worker" in thread_names(rank["pid"])  # as Intel's runtime names its threads
        reply = deployment.http.complete(PROMPT, max_tokens=16, ignore_eos=True)
        assert reply.token_ids == reference_of("qwen3")(PROMPT, 16)
        ours = [file.name for file in set(SHARED_MEMORY.iterdir()) - before if f"LIB_{rank['pid']}_" in file.name]
        assert ours == []


def test_an_engine_runs_under_gnus_runtime_where_the_user_tunes_that_one(
    folder_of: Callable[[str], Path], reference_of: Callable[[str], Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "100")
    with Deployment(folder_of("qwen3"), *FLAGS) as deployment:
        rank = the_rank(deployment)
        assert rank["openmp"].startswith("libgomp")
        assert rank["threads"] == 2
        assert "libiomp5.so" not in mapped(rank["pid"])
        reply = deployment.http.complete(PROMPT, max_tokens=16, ignore_eos=True)
        assert reply.token_ids == reference_of("qwen3")(PROMPT, 16)
