from typing import Any

import pytest

from tandem.api.openapi_page import GETS, POSTS
from tests.api.conftest import Api


def test_the_document_has_every_field_that_is_served(api: Api) -> None:
    found = api.get("/openapi.json").json
    assert found["openapi"].startswith("3.1")
    schemas = found["components"]["schemas"]
    for path, (kind, _) in POSTS.items():
        reference = found["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        assert set(schemas[reference.rpartition("/")[2]]["properties"]) == set(kind.__struct_fields__)


def test_every_reference_leads_somewhere(api: Api) -> None:
    found = api.get("/openapi.json").json

    def check(value: Any) -> None:
        if isinstance(value, dict):
            if "$ref" in value:
                assert value["$ref"].rpartition("/")[2] in found["components"]["schemas"]
            for one in value.values():
                check(one)
        elif isinstance(value, list):
            for one in value:
                check(one)

    check(found["paths"])
    check(found["components"])


@pytest.mark.parametrize("path", [*GETS, *POSTS])
def test_every_path_of_it_is_there(api: Api, path: str) -> None:
    reply = api.get(path) if path in GETS else api.send("POST", path, b"{")
    assert reply.status == (200 if path in GETS else 400)


def test_the_page_is_for_people_and_needs_nothing_from_elsewhere(api: Api) -> None:
    reply = api.get("/docs")
    assert reply.headers["content-type"].startswith("text/html")
    assert all(path in reply.body.decode() for path in (*GETS, *POSTS))
    assert "http" not in reply.body.decode()
