"""Nodes as network namespaces on one switch, each with an address and a loopback of its own.

Needs root and iproute2.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ASK = (
    "import json, sys, urllib.request, urllib.error\n"
    "url, body = sys.argv[1], sys.stdin.buffer.read()\n"
    "request = urllib.request.Request(url, data=body or None, headers={'Content-Type': 'application/json'})\n"
    "try:\n"
    "    with urllib.request.urlopen(request, timeout=120) as answer:\n"
    "        print(answer.status, answer.read().decode())\n"
    "except urllib.error.HTTPError as error:\n"
    "    print(error.code, error.read().decode())\n"
    "except OSError as error:\n"
    "    print(0, json.dumps({'unreachable': str(error)}))\n"
)


def why_not() -> str | None:
    """Why there can be no namespaces here; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2 (the `ip` command)"
    probe = f"tdm-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"this machine lets no namespace be made: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


@dataclass
class Process:
    """A command running on a node; what it prints goes to a file."""

    popen: subprocess.Popen[bytes]
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float) -> int:
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.output}") from None

    def stop(self) -> None:
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGINT)
            try:
                self.popen.wait(10)
            except subprocess.TimeoutExpired:
                self.popen.kill()
                self.popen.wait(10)


@dataclass
class Node:
    """A host: namespace, address, name."""

    namespace: str
    address: str
    name: str
    lab: Lab
    processes: list[Process] = field(default_factory=list)

    def run(self, *command: str, env: dict[str, str] | None = None, talks: bool = False) -> Process:
        """Start a command here. `talks`: its stdin is a pipe; else it is empty."""
        log = self.lab.folder / f"{self.name}-{len(self.processes)}.log"
        # Namespaces share a kernel, through which UCX would read the other "node" as memory of this machine.
        network_only = {"UCX_TLS": "tcp"}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **network_only, **(env or {})}
        with log.open("wb") as out:
            popen = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *command],
                stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        process = Process(popen, log)
        self.processes.append(process)
        return process

    def tandem(self, *arguments: str) -> Process:
        return self.run(sys.executable, "-c", "from tandem.cli import main; main()", *arguments)

    def ask(self, url: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """HTTP from this node: status and decoded JSON (status 0: not reachable)."""
        done = subprocess.run(
            ["ip", "netns", "exec", self.namespace, sys.executable, "-c", ASK, url],
            input=json.dumps(body).encode() if body is not None else b"",
            capture_output=True,
            timeout=150,
            check=True,
        )
        status, _, text = done.stdout.decode().partition(" ")
        return int(status), json.loads(text or "null")


@dataclass
class Lab:
    """A switch and the nodes on it."""

    folder: Path
    nodes: list[Node] = field(default_factory=list)

    @property
    def logs(self) -> str:
        return "\n".join(
            f"--- {node.name}: {p.popen.args!r}\n{p.output[-6000:]}" for node in self.nodes for p in node.processes
        )

    def until(self, what: Callable[[], Any], seconds: float, why: str) -> Any:
        """Poll until `what` is true; fails, with all logs, when it is not in time or a process has died."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if result := what():
                return result
            for node in self.nodes:
                for process in node.processes:
                    assert process.popen.poll() is None, f"a process ended, {why}\n{self.logs}"
            time.sleep(0.25)
        raise AssertionError(f"not within {seconds} s: {why}\n{self.logs}")


@contextmanager
def lab(count: int) -> Iterator[Lab]:
    """`count` nodes named node-0, node-1, ..., which know each other's names; gone afterwards, whatever happens."""
    mark = uuid.uuid4().hex[:6]
    folder = Path(tempfile.mkdtemp(prefix="tandem-lab-"))
    made = Lab(folder)
    switch = f"tdm{mark}s"
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        for index in range(count):
            made.nodes.append(_add_node(made, mark, switch, index))
        for node in made.nodes:
            _write_hosts(made, node, {other.name: other.address for other in made.nodes})
        yield made
    finally:
        for node in made.nodes:
            for process in node.processes:
                process.stop()
        for namespace in [*(node.namespace for node in made.nodes), switch]:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)
            shutil.rmtree(f"/etc/netns/{namespace}", ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)


def _add_node(made: Lab, mark: str, switch: str, index: int) -> Node:
    namespace, address = f"tdm{mark}n{index}", f"10.201.77.{index + 1}"
    _ip("netns", "add", namespace)
    node = Node(namespace, address, f"node-{index}", made)
    made_here = f"tv{mark}{index}"
    _ip("link", "add", made_here, "netns", namespace, "type", "veth", "peer", "name", f"p{index}", "netns", switch)
    _ip("-n", namespace, "link", "set", made_here, "name", "eth0")
    _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
    for device in ("lo", "eth0"):
        _ip("-n", namespace, "link", "set", device, "up")
    _ip("-n", switch, "link", "set", f"p{index}", "master", "br0", "up")
    return node


def write_hosts(node: Node, names: dict[str, str]) -> None:
    """What host names mean on this node."""
    _write_hosts(node.lab, node, names)


def _write_hosts(made: Lab, node: Node, names: dict[str, str]) -> None:
    folder = Path("/etc/netns") / node.namespace
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in names.items())]
    (folder / "hosts").write_text("\n".join(lines) + "\n")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
