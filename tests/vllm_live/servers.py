"""Real servers: `vllm serve` with the connector, and Tandem's own engine, on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

START_SECONDS = 400.0
MODEL = "m"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Server:
    """A child that answers HTTP at `port`; its output is in `log`."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(f"not ready in {START_SECONDS:.0f} s: {self.log.read_text()[-4000:]}")

    def complete(self, prompt: list[int], **fields: Any) -> dict[str, Any]:
        """POST /v1/completions, greedy, 12 tokens."""
        return self._post("/v1/completions", {"prompt": prompt, **fields})

    def chat(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        """POST /v1/chat/completions, greedy, 12 tokens."""
        return self._post("/v1/chat/completions", {"messages": messages})

    def _post(self, path: str, fields: dict[str, Any]) -> dict[str, Any]:
        body = {"model": MODEL, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **fields}
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{self.url}{path}", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=120) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def metric(self, name: str) -> float:
        """Return the sum of all samples of a metric."""
        text = urllib.request.urlopen(f"{self.url}/metrics", timeout=30).read().decode()
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))

    @contextlib.contextmanager
    def standing_still(self) -> Iterator[None]:
        """Stop all its processes meanwhile."""
        own = psutil.Process(self.process.pid)
        everything = [own, *own.children(recursive=True)]
        for process in everything:
            process.suspend()
        try:
            yield
        finally:
            for process in everything:
                process.resume()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass
class Servers:
    """Starts servers for one model folder and ends them."""

    folder: Path
    model: Path
    running: list[Server] = field(default_factory=list)

    def vllm(self, name: str, core: str, *arguments: str, block_size: int = 32, **options: Any) -> Server:
        """Start `vllm serve` on these cores; ready once `wait_ready` returns."""
        port = free_port()
        config = {
            "kv_connector": "TandemConnector",
            "kv_connector_module_path": "tandem.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"arena_gib": 0.03, **options},
        }
        command = [
            *(str(Path(sys.executable).parent / "vllm"), "serve", str(self.model), "--served-model-name", MODEL),
            *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"),
            *("--kv-cache-memory-bytes", str(64 << 20), "--max-model-len", "1024", "--max-num-batched-tokens", "256"),
            *("--block-size", str(block_size), "--kv-transfer-config", json.dumps(config), *arguments),
        ]
        environment = {"VLLM_CPU_OMP_THREADS_BIND": core, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        return self._start(name, port, command, environment)

    def tandem(self, name: str, *arguments: str) -> Server:
        """Start `tandem engine`."""
        port = free_port()
        command = [
            *(sys.executable, "-m", "tandem", "engine", str(self.model), "--served-model-name", MODEL),
            *("--dtype", "float32", "--port", str(port), "--kv-memory", "32MiB", "--max-model-len", "1024", *arguments),
        ]
        return self._start(name, port, command, {"OMP_NUM_THREADS": "1"})

    def proxy(self, name: str, prefill: Server, decode: Server) -> Server:
        """Start a PD proxy that knows nothing of Tandem."""
        port = free_port()
        script = Path(__file__).parents[2] / "examples/pd_proxy.py"
        command = [
            *(sys.executable, str(script), "--port", str(port)),
            "--prefill",
            prefill.url,
            "--decode",
            decode.url,
        ]
        return self._start(name, port, command, {})

    def _start(self, name: str, port: int, command: list[str], environment: dict[str, str]) -> Server:
        log = self.folder / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environment}, cwd=self.folder
            )
        server = Server(process, port, log)
        self.running.append(server)
        return server

    def stop(self) -> None:
        for server in self.running:
            server.stop()


def hand_off(prefill: Server, decode: Server, prompt: list[int], **fields: Any) -> dict[str, Any]:
    """Do what a sequential proxy for vLLM does: one after the other, with the parameters passed on unread."""
    asked = {"do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_host": None}
    first = prefill.complete(prompt, max_tokens=1, kv_transfer_params=asked)
    return decode.complete(prompt, kv_transfer_params=first["kv_transfer_params"], **fields)
