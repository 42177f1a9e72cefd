import re
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from tandem.api.api_keys import ApiKeys
from tandem.api.backend import Health, TokenDelta
from tandem.config_limits import LimitsSection
from tandem.errors import Unavailable
from tandem.wire.fields import MAX_TEXT
from tandem.wire.messages import KvTransferParams
from tests.api.conftest import MODEL, MODEL_LEN, Api, FakeBackend, details, ids, running


def test_the_model_is_listed(api: Api) -> None:
    listed = api.client().models.list().data
    assert [(one.id, one.object, (one.model_extra or {})["max_model_len"]) for one in listed] == [
        (MODEL, "model", MODEL_LEN)
    ]
    assert api.client().models.retrieve(MODEL).id == MODEL
    assert api.get("/v1/models/org/other").error["code"] == "model_not_found"


@pytest.mark.parametrize("name", [MODEL, "./models/tiny", "org/tiny", None])
def test_a_model_may_be_called_by_any_of_its_names(api: Api, name: str | None) -> None:
    for reply in (api.complete(model=name), api.chat(model=name)):
        assert (reply.status, reply.json["model"]) == (200, MODEL)
    assert name is None or api.get(f"/v1/models/{name}").json["id"] == MODEL


def test_health_is_the_backends(api: Api) -> None:
    assert api.get("/health").status == 200
    api.backend.found = Health(False, "no decode engine has registered")
    reply = api.get("/health")
    assert (reply.status, reply.json["detail"]) == (503, "no decode engine has registered")


def test_before_an_engine_has_registered_requests_are_told_to_come_again(api: Api) -> None:
    api.backend.no_model = Unavailable("no engine has registered yet")
    for reply in (api.complete(), api.chat(stream=True), api.get("/v1/models")):
        assert (reply.status, reply.headers["retry-after"]) == (503, "1")
        assert reply.error["message"] == "no engine has registered yet"


def test_another_model_is_not_found(api: Api) -> None:
    reply = api.complete(model="gpt-4")
    assert (reply.status, reply.error["code"], reply.error["param"]) == (404, "model_not_found", "model")


def test_a_model_folder_without_tokenizer_is_a_500_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with running(FakeBackend(tmp_path)) as api:
        assert "tokenizer.json" in api.complete().error["message"]


@pytest.mark.parametrize("path", ["x" * 4096, "a\0b"])
def test_a_model_folder_that_cannot_be_is_a_500_that_says_so(path: str) -> None:
    with running(FakeBackend(Path(path))) as api:
        assert "text files cannot be used" in api.complete().error["message"]


def test_an_error_quotes_a_large_body_only_in_part(api: Api) -> None:
    for body in ({"x" * 100_000: 1}, {"model": "x" * 100_000}):
        error = api.complete(**body).error
        assert max(len(error["message"]), len(error["param"])) <= MAX_TEXT


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", "/v1/completions", 405), ("POST", "/health", 405)]
)
def test_paths_and_methods_that_are_not_there_have_openais_error_shape(
    api: Api, method: str, path: str, status: int
) -> None:
    reply = api.send(method, path)
    assert reply.status == status
    assert path in reply.error["message"]


def test_a_request_id_is_taken_over_echoed_and_sent_on(api: Api) -> None:
    reply = api.send("POST", "/v1/completions", {"prompt": "x"}, {"X-Request-Id": "job-7.a:b_c"})
    assert reply.headers["x-request-id"] == "job-7.a:b_c"
    assert reply.json["id"] == "cmpl-job-7.a:b_c"
    assert api.backend.requests[0].request_id == "job-7.a:b_c"


@pytest.mark.parametrize("bad", ["", "a b", "x" * 129, "ü", "a;b"])
def test_a_request_id_that_is_too_long_or_strange_is_replaced(api: Api, bad: str) -> None:
    reply = api.send("POST", "/v1/completions", {"prompt": "x"}, {"X-Request-Id": bad.encode()})
    assert re.fullmatch("[0-9a-f]{32}", reply.headers["x-request-id"])


def test_errors_have_a_request_id_too(api: Api) -> None:
    assert api.send("POST", "/v1/completions", b"{", {"X-Request-Id": "me"}).headers["x-request-id"] == "me"
    assert api.get("/nowhere").headers["x-request-id"]


def test_with_an_api_key_only_v1_is_closed(folder: Path) -> None:
    with running(FakeBackend(folder), keys=ApiKeys("sésame")) as api:
        for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "sésame"}):
            reply = api.send("POST", "/v1/completions", {"prompt": "x"}, {k: v.encode() for k, v in headers.items()})
            assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
        good = {"Authorization": "bearer sésame".encode()}
        assert api.send("POST", "/v1/completions", {"prompt": "x"}, good).status == 200
        assert [api.get(path).status for path in ("/health", "/metrics", "/tandem/engines")] == [200, 200, 200]
        with pytest.raises(openai.AuthenticationError):
            api.client("wrong").models.list()


def test_a_body_over_the_limit_is_refused_before_it_is_read(folder: Path) -> None:
    with running(FakeBackend(folder), limits=LimitsSection(max_body=1000)) as api:
        reply = api.complete(prompt="x" * 2000)
        assert (reply.status, reply.error["code"]) == (413, "request_too_large")
        connection = api.connect()
        connection.request("POST", "/v1/completions", iter([b"x" * 600] * 2), encode_chunked=True)
        assert connection.getresponse().status == 413
        connection.close()


def test_a_router_shows_its_engines(api: Api) -> None:
    engines = api.get("/tandem/engines").json["engines"]
    assert [(one["engine_id"], one["role"], one["state"], one["reason"]) for one in engines] == [
        ("p0", "prefill", "ready", None),
        ("d0", "decode", "lost", "its connection broke"),
    ]
    assert api.get("/tandem/engine").status == 404


def test_an_engine_shows_itself(engine_api: Api) -> None:
    engine = engine_api.get("/tandem/engine").json
    assert (engine["engine_id"], engine["role"], engine["kv"]["free"]) == ("p0", "prefill", 4)
    assert (engine["version"], engine["dtype"], engine["max_model_len"]) == ("0", "float32", 100)
    assert (engine["peer_address"], engine["http_address"]) == ("127.0.0.1:20001", None)
    assert not {"type", "state"} & engine.keys()
    assert engine_api.get("/tandem/engines").status == 404


def test_an_engine_hands_kv_parameters_to_the_backend_and_back_to_the_proxy(engine_api: Api) -> None:
    made = KvTransferParams(
        do_remote_prefill=True, remote_engine_id="p0", remote_host="h", remote_port=5, remote_block_ids=[1]
    )
    engine_api.backend.script = lambda request: [
        TokenDelta(ids("h"), finish_reason="length", details=details(), kv_transfer_params=made)
    ]
    asked = {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "remote_engine_id": None,
        "remote_host": None,
        "new": 1,
    }
    for reply in (
        engine_api.complete(max_tokens=1, kv_transfer_params=asked),
        engine_api.chat(kv_transfer_params=asked),
    ):
        assert reply.json["kv_transfer_params"] == {
            "do_remote_prefill": True,
            "remote_engine_id": "p0",
            "remote_host": "h",
            "remote_port": 5,
            "remote_block_ids": [1],
        }
    assert [one.kv_transfer_params for one in engine_api.backend.requests] == [
        KvTransferParams(do_remote_decode=True)
    ] * 2
    assert engine_api.complete(n=2, kv_transfer_params=asked).error["param"] == "kv_transfer_params"


def sample(text: str, name: str) -> float:
    return next(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name + " "))


def test_metrics_count_requests_tokens_and_what_engines_tell(folder: Path) -> None:
    with running(FakeBackend(folder)) as api:
        api.complete()
        api.chat(stream=True)
        api.complete(top_p=5)
        reply = api.get("/metrics")
    text = reply.body.decode()
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    tokens = len(ids("hello") + ids(" world")) + 1
    expected = {
        'tandem_requests_total{endpoint="completions",outcome="ok"}': 1,
        'tandem_requests_total{endpoint="chat",outcome="ok"}': 1,
        'tandem_requests_total{endpoint="completions",outcome="invalid_request"}': 1,
        'tandem_requests_running{endpoint="completions"}': 0,
        "tandem_time_to_first_token_seconds_count": 2,
        "tandem_inter_token_latency_seconds_count": 2 * (tokens - len(ids("hello"))),
        "tandem_request_seconds_count": 2,
        "tandem_output_tokens_total": 2 * tokens,
        'tandem_engine_ready{engine_id="p0",role="prefill"}': 1,
        'tandem_engine_ready{engine_id="d0",role="decode"}': 0,
        'tandem_engine_kv_blocks{engine_id="p0",role="prefill",state="leased"}': 2,
        'tandem_engine_live_requests{engine_id="d0",role="decode",state="running"}': 3,
        'tandem_engine_kv_bytes_total{engine_id="d0",role="decode"}': 0,
    }
    assert {name: sample(text, name) for name in expected} == expected
    assert all(line.startswith(("#", "tandem_", "vllm:")) for line in text.splitlines())


def test_the_application_imports_neither_torch_nor_transformers() -> None:
    modules = "tandem.api.app, tandem.api.http_server"
    code = f"import sys, {modules}; sys.exit(bool({{'torch', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
