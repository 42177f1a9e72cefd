"""`tandem doctor` as a person meets it: its output and exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest

import tandem
from tandem.commands.doctor import run_doctor
from tandem.commands.doctor_options import DoctorOptions
from tandem.errors import ConfigError, StartError, WireError
from tandem.wire.engine_status import EngineStatus, KvUsage, PeerInfo, RankInfo, Refusal, RequestCounts
from tandem.wire.messages import Address

Answers = dict[str, tuple[int, Any]]
Serve = Callable[[Answers], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts an HTTP server with these answers by path; gives its URL."""
    servers: list[ThreadingHTTPServer] = []

    def start(answers: Answers) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body = answers.get(self.path, (404, {}))
                if answers.get("key") and self.headers["Authorization"] != f"Bearer {answers['key'][1]}":
                    status, body = 401, {}
                raw = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def engine(name: str, role: str, peers: Sequence[PeerInfo] = ()) -> dict[str, Any]:
    """As GET /tandem/engines has it."""
    status = EngineStatus(
        name, f"{name}-1", role, "tiny", name[0] * 64, 2, 1, 1, "nixl",
        ranks=[RankInfo(0, 0, 0, "host-a", 1, name, f"{name}-1")], kv=KvUsage(16, 0, 0, 0, 0, 0),
        requests=RequestCounts(), peers=list(peers),
    )  # fmt: skip
    listed: dict[str, Any] = msgspec.to_builtins(status)
    del listed["type"]
    registered = {"dtype": "bfloat16", "version": "0.1.0", "peer_address": "10.0.0.1:4000", "max_model_len": 512}
    return listed | registered | {"state": "ready"}


def peer(name: str, state: str = "ready", error: str | None = None, refusal: Refusal | None = None) -> PeerInfo:
    return PeerInfo(name, f"{name}-1", state, error, refusal=refusal)


def ask(url: str, api_key: str | None = None) -> int:
    return run_doctor(DoctorOptions(url=url, api_key=api_key))


def test_alone_it_names_versions_and_nixl_and_finds_no_problem_here() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(tandem.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", "from tandem.cli import main; main()", "doctor"],
        capture_output=True, text=True, timeout=240, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("nixl", "torch", "python", tandem.__version__, "libzmq", "/dev/shm", "port 8000", "0 problems"):
        assert word in done.stdout


def test_a_router_whose_pairs_all_work_has_nothing_to_mend(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    engines = [engine("p", "prefill"), engine("d", "decode", [peer("p")])]
    url = serve({"/tandem/engines": (200, {"engines": engines}), "/health": (200, {"status": "ok"})})
    assert ask(url) == 0
    assert "2 engines, 1 pairs of prefill and decode, 0 refused or lost" in capsys.readouterr().out


def test_each_refused_pair_is_explained_and_fails_the_check(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    peers = [
        peer("p"),
        peer("q", "refused", "in words", Refusal("fingerprint", "a" * 64, "b" * 64)),
        peer("r", "refused", "in words", Refusal("connector", "nixl", "tcp")),
        peer("s", "lost", "no answer from s at 10.0.0.1:4000 in 10 s"),
    ]
    engines = [*(engine(peer.engine_id, "prefill") for peer in peers), engine("d", "decode", peers)]
    url = serve({"/tandem/engines": (200, {"engines": engines}), "/health": (200, {"status": "ok"})})
    assert ask(url) == 1
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in ("d has aaaaaaaaaaaa", "--connector", "firewall", "3 refused or lost"):
        assert words in out
    assert "no request can be served" not in out


def test_without_a_whole_path_it_says_so_and_fails(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(serve({"/tandem/engines": (200, {"engines": [engine("p", "prefill")]})})) == 1
    assert "no decode engine is ready" in capsys.readouterr().out


def test_a_router_that_says_it_is_not_ready_is_believed(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    health = (503, {"status": "unavailable", "detail": "just starting"})
    assert ask(serve({"/tandem/engines": (200, {"engines": [engine("x", "mixed")]}), "/health": health})) == 1
    assert "just starting" in capsys.readouterr().out


def test_a_key_is_sent_and_asked_for(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    url = serve({"/tandem/engines": (200, {"engines": [engine("x", "mixed")]}), "key": (0, "secret")})
    with pytest.raises(ConfigError, match="--api-key"):
        ask(url)
    ask(url, "secret")
    assert "1 engines" in capsys.readouterr().out


def test_an_engine_is_told_from_a_router_and_from_something_else(serve: Serve) -> None:
    with pytest.raises(ConfigError, match="an engine's own API"):
        ask(serve({"/tandem/engine": (200, {})}))
    with pytest.raises(ConfigError, match="no Tandem router"):
        ask(serve({}))


@pytest.mark.parametrize("body", [b"<html>", b"", b'{"engines": 3}', b"\xff\xfe"])
def test_an_answer_that_is_not_a_routers_is_one_sentence(serve: Serve, body: bytes) -> None:
    with pytest.raises(WireError, match="tandem/engines"):
        ask(serve({"/tandem/engines": (200, body)}))


def test_nobody_at_the_url_is_one_sentence(serve: Serve) -> None:
    with pytest.raises(StartError, match="no router answers"):
        ask("http://127.0.0.1:1")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "router:8000", "http://"])
def test_a_url_must_be_one_of_http(url: str) -> None:
    with pytest.raises(ConfigError, match="--url must be"):
        ask(url)


@pytest.mark.parametrize(("options", "words"), [
    (DoctorOptions(url="http://x", nnodes=2), "give one of them"),
    (DoctorOptions(master=Address("10.0.0.1", 5)), "--nnodes"),
    (DoctorOptions(nnodes=2), "--master"),
    (DoctorOptions(nnodes=2, node_rank=1, master=Address("10.0.0.1", 5), host="127.0.0.1"), "set --host"),
    (DoctorOptions(nnodes=2, tp=3, master=Address("10.0.0.1", 5)), "evenly"),
])  # fmt: skip
def test_flags_that_do_not_go_together_are_refused_in_words(options: DoctorOptions, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run_doctor(options)
