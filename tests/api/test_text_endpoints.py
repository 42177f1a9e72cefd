from pathlib import Path
from typing import Any

import pytest

from tandem import __version__
from tandem.api.api_keys import ApiKeys
from tandem.errors import Unavailable
from tests.api.conftest import END, MODEL_LEN, START, Api, FakeBackend, Reply, ids, running

USER = {"role": "user", "content": "hello"}


def tokenize(api: Api, **body: Any) -> Reply:
    return api.send("POST", "/tokenize", body)


def detokenize(api: Api, **body: Any) -> Reply:
    return api.send("POST", "/detokenize", body)


def test_a_prompt_is_tokenized_and_back(api: Api) -> None:
    text = f"hello{END} köln 東"
    reply = tokenize(api, prompt=text, model="org/tiny")
    assert reply.json == {"count": len(ids(text)), "max_model_len": MODEL_LEN, "tokens": ids(text), "token_strs": None}
    assert detokenize(api, tokens=ids(text)).json == {"prompt": text}
    assert not api.backend.requests


def test_tokens_can_be_shown_as_the_vocabulary_writes_them(api: Api) -> None:
    found = tokenize(api, prompt=f" ü{END}", return_token_strs=True).json
    assert "".join(found["token_strs"]) == f"Ġü{END}".replace("ü", "\u00c3\u00bc")


@pytest.mark.parametrize(
    ("fields", "end"),
    [
        ({}, f"{END}\n{START}assistant\n"),
        ({"add_generation_prompt": False}, f"{END}\n"),
        ({"continue_final_message": True}, ""),
        ({"continue_final_message": True, "add_generation_prompt": False}, ""),
    ],
)
def test_a_chat_is_tokenized_as_it_would_be_answered(api: Api, fields: dict[str, Any], end: str) -> None:
    expected = ids(f"{START}user\nhello{end}")
    assert tokenize(api, messages=[USER], **fields).json["tokens"] == expected
    api.chat(**fields)
    assert api.backend.requests[-1].token_ids == expected


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": "x", "messages": [USER]},
        {"prompt": 7},
        {"messages": []},
        {"messages": [USER], "continue_final_message": True, "add_generation_prompt": True},
        {"prompt": "x", "colour": 1},
        {"prompt": "x" * 100_000},
    ],
)
def test_what_cannot_be_tokenized_is_refused(api: Api, body: dict[str, Any]) -> None:
    assert tokenize(api, **body).status == 400


@pytest.mark.parametrize("tokens", [[-1], [10**6], ["a"], "a", None, [1.5], [1] * 65538])
def test_what_is_no_token_cannot_be_detokenized(api: Api, tokens: Any) -> None:
    assert detokenize(api, tokens=tokens).error["param"] in ("tokens", "tokens[0]", None)
    assert detokenize(api, tokens=tokens).status == 400


def test_another_models_text_is_not_found(api: Api) -> None:
    assert tokenize(api, prompt="x", model="other").error["code"] == "model_not_found"
    assert detokenize(api, tokens=[1], model="other").error["code"] == "model_not_found"


def test_no_tokens_are_no_text(api: Api) -> None:
    assert tokenize(api, prompt="").json["tokens"] == []
    assert detokenize(api, tokens=[]).json == {"prompt": ""}


def test_version_ping_and_load_are_as_load_balancers_ask_for_them(api: Api) -> None:
    assert api.get("/version").json == {"version": __version__}
    assert [api.get("/ping").status, api.send("POST", "/ping").status] == [200, 200]
    assert api.get("/load").json == {"server_load": 0}
    api.backend.script = lambda request: ["hang"]
    waiting = api.connect()
    waiting.request("POST", "/v1/completions", b'{"prompt": "x"}')
    assert api.backend.hanging.wait(10)
    assert api.get("/load").json == {"server_load": 1}
    waiting.close()


def test_an_api_key_guards_work_on_text_and_not_whether_the_server_is_there(folder: Path) -> None:
    with running(FakeBackend(folder), keys=ApiKeys("secret")) as api:
        assert tokenize(api, prompt="x").status == detokenize(api, tokens=[1]).status == 401
        headers = {"Authorization": "Bearer secret"}
        assert api.send("POST", "/tokenize", {"prompt": "x"}, headers).status == 200
        assert [api.get(path).status for path in ("/version", "/ping", "/load")] == [200] * 3


def test_before_an_engine_has_registered_there_is_no_model_to_tokenize_for(api: Api) -> None:
    api.backend.no_model = Unavailable("no engine has registered yet")
    assert (tokenize(api, prompt="x").status, api.get("/version").status) == (503, 200)
