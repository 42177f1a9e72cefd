"""POST /tandem/engines/...: who may run the engines, and what is answered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tandem.api.api_keys import ApiKeys
from tandem.api.backend import EngineState
from tandem.api.connections import is_local
from tandem.api.http_errors import NotFound
from tandem.wire.control_messages import Role
from tests.api.conftest import Api, FakeBackend, ListedEngine, listed_engine, running

DRAIN, CHANGE = "/tandem/engines/d0/drain", "/tandem/engines/d0/role/prefill"


@dataclass
class FakeOperator:
    """Knows one engine, d0. `told`: what it was to do."""

    told: list[str] = field(default_factory=list)

    async def drain(self, engine_id: str) -> ListedEngine:
        return self._tell(engine_id, "drain", "decode")

    async def change_role(self, engine_id: str, role: Role) -> ListedEngine:
        return self._tell(engine_id, role, role)

    def _tell(self, engine_id: str, what: str, role: str) -> ListedEngine:
        if engine_id not in ("d0", "a/b c"):
            raise NotFound(f"there is no engine {engine_id!r} here")
        self.told.append(f"{engine_id}: {what}")
        return listed_engine(engine_id, role, EngineState.READY)


@pytest.fixture
def operator() -> FakeOperator:
    return FakeOperator()


@pytest.fixture
def open_api(folder: Path, operator: FakeOperator) -> Iterator[Api]:
    with running(FakeBackend(folder), operator=operator) as api:
        yield api


@pytest.fixture
def keyed_api(folder: Path, operator: FakeOperator) -> Iterator[Api]:
    with running(FakeBackend(folder), keys=ApiKeys("secret"), operator=operator) as api:
        yield api


def test_the_answer_names_the_incarnation_and_how_long_it_may_take(open_api: Api, operator: FakeOperator) -> None:
    reply = open_api.send("POST", DRAIN)
    assert (reply.status, reply.json) == (202, {"engine_id": "d0", "incarnation": "i", "drain_timeout": 30.0})
    reply = open_api.send("POST", CHANGE)
    assert (reply.status, reply.json) == (200, {"engine_id": "d0", "incarnation": "i", "role": "prefill"})
    assert operator.told == ["d0: drain", "d0: prefill"]


def test_an_engine_may_be_called_anything(open_api: Api, operator: FakeOperator) -> None:
    assert open_api.send("POST", "/tandem/engines/a%2Fb%20c/drain").status == 202
    assert operator.told == ["a/b c: drain"]


def test_what_cannot_be_is_refused_and_reaches_nobody(open_api: Api, operator: FakeOperator) -> None:
    reply = open_api.send("POST", "/tandem/engines/d0/role/both")
    assert (reply.status, reply.error["message"]) == (400, "a role is one of prefill, decode, mixed; got 'both'")
    assert open_api.send("POST", "/tandem/engines/d1/drain").status == 404
    assert open_api.send("GET", DRAIN).status == 405
    assert operator.told == []


@pytest.mark.parametrize("path", [DRAIN, CHANGE])
def test_with_api_keys_it_takes_one_to_run_an_engine_and_none_to_look(
    path: str, keyed_api: Api, operator: FakeOperator
) -> None:
    assert keyed_api.send("POST", path).status == 401
    assert keyed_api.send("POST", path, headers={"Authorization": "Bearer other"}).status == 401
    assert operator.told == []
    assert keyed_api.get("/tandem/engines").status == 200
    assert keyed_api.send("POST", path, headers={"Authorization": "Bearer secret"}).status in (200, 202)
    assert len(operator.told) == 1


@pytest.mark.parametrize(
    "headers",
    [{"X-Forwarded-For": "192.0.2.1"}, {"Origin": "http://127.0.0.1:8000"}, {"Origin": "null"}],
    ids=["from another machine", "from a web page", "from a page of no origin"],
)
def test_without_keys_an_engine_is_run_from_its_own_machine_alone(
    headers: dict[str, str], open_api: Api, operator: FakeOperator
) -> None:
    reply = open_api.send("POST", DRAIN, headers=headers)
    assert (reply.status, reply.error["code"]) == (403, "forbidden")
    assert "--api-key-file" in reply.error["message"]
    assert operator.told == []


def test_an_engines_own_api_runs_no_engines(engine_api: Api) -> None:
    assert engine_api.send("POST", DRAIN).status == 404


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.255.255.255", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("128.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("localhost", False),
        ("", False),
    ],
)
def test_only_addresses_of_loopback_are_this_machine(host: str, local: bool) -> None:
    assert is_local(host) is local
