import asyncio
import contextlib
import json
import signal
import socket
from pathlib import Path

import pytest
from starlette.applications import Starlette

from tandem.api.app import create_app
from tandem.api.http_server import bind, serve
from tandem.api.loaded_model import ModelLoader
from tandem.errors import ConfigError, RequestError, Unavailable
from tests.api.conftest import HANG, FakeBackend


def app(backend: FakeBackend) -> Starlette:
    return create_app(backend, ModelLoader(backend), kind="router")


def test_a_taken_port_is_named() -> None:
    with contextlib.closing(bind("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
            bind("127.0.0.1", port)


@pytest.mark.parametrize(("host", "port"), [("no..host", 80), ("127.0.0.1", 70000)])
def test_an_address_that_cannot_be_is_named(host: str, port: int) -> None:
    with pytest.raises(ConfigError, match=f"{host}:{port}"):
        bind(host, port)


def test_a_server_leaves_signals_alone_stops_when_told_and_closes_its_socket(folder: Path) -> None:
    listener = bind("127.0.0.1", 0)
    address = listener.getsockname()

    async def run() -> None:
        before = signal.getsignal(signal.SIGINT)
        stop = asyncio.Event()
        serving = asyncio.create_task(serve(app(FakeBackend(folder)), listener, stop))
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"200" in await reader.readline()
        assert signal.getsignal(signal.SIGINT) is before
        stop.set()
        await serving
        writer.close()

    asyncio.run(run())
    with contextlib.closing(socket.socket()) as client:
        assert client.connect_ex(address) != 0


def test_requests_that_do_not_end_in_time_are_aborted_when_the_server_stops(folder: Path) -> None:
    backend = FakeBackend(folder, lambda request: [HANG])
    listener = bind("127.0.0.1", 0)

    async def run() -> None:
        stop = asyncio.Event()
        serving = asyncio.create_task(serve(app(backend), listener, stop, grace=1))
        _, writer = await asyncio.open_connection(*listener.getsockname())
        body = json.dumps({"prompt": "x"}).encode()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        await asyncio.to_thread(backend.hanging.wait, 10)
        stop.set()
        await serving
        writer.close()

    asyncio.run(run())
    assert backend.aborted == [backend.requests[0].request_id]


def test_a_model_is_loaded_once_and_a_folder_that_cannot_be_used_is_an_error(folder: Path, tmp_path: Path) -> None:
    async def load_twice(backend: FakeBackend) -> bool:
        loader = ModelLoader(backend)
        return await loader.get() is await loader.get()

    assert asyncio.run(load_twice(FakeBackend(folder)))
    with pytest.raises(Unavailable):
        asyncio.run(load_twice(FakeBackend(folder, no_model=Unavailable("none"))))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(RequestError, match="tokenizer"):
        asyncio.run(load_twice(FakeBackend(tmp_path)))
