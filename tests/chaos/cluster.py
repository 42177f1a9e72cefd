"""A cluster on loopback, each part started by its own command and started again when it ended, as systemd would."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tests.chaos.processes import command_line, free_ports, in_session, is_stopped, listeners, parent_of
from tests.chaos.support import clean_environment, flags, is_alive, session_of, tandem_command

RESTART_SECONDS = 0.2
LEFT_BEHIND_SECONDS = 10.0
"""Processes of a command that are there for longer than this after its end were left behind."""
STOP_SECONDS = 20.0
POLL = aiohttp.ClientTimeout(total=3.0)


@dataclass(frozen=True)
class EngineShape:
    """An engine of the cluster. `ranks`: tensor parallel, or a pipeline where the settings say so."""

    role: str
    ranks: int


ENGINES = {
    "prefill-0": EngineShape("prefill", 1),
    "prefill-1": EngineShape("prefill", 2),
    "decode-0": EngineShape("decode", 1),
    "decode-1": EngineShape("decode", 2),
}


@dataclass(frozen=True)
class Settings:
    """What a cluster is started with.

    Attributes:
        work: for logs and files.
        kv_memory: bytes of an engine, over its ranks.
        pipeline: the engine whose ranks are the stages of a pipeline (pp), if there is one.
    """

    model: Path
    work: Path
    connector: str
    key: bool = False
    pipeline: str | None = None
    lease_ttl: float = 2.0
    request_timeout: float = 60.0
    kv_memory: int = 1408 << 10
    log_level: str = "info"


@dataclass(frozen=True)
class Ending:
    """A command that ended though nobody asked it to. `at`: time.monotonic()."""

    name: str
    at: float
    code: int
    left: tuple[str, ...] = ()


@dataclass
class Supervised:
    """One command in a session of its own, started again whenever it ends.

    Attributes:
        starts: how often it was started.
        endings: in order; shared by all commands of a cluster.
    """

    name: str
    arguments: Sequence[str]
    log: Path
    environment: dict[str, str]
    endings: list[Ending]
    starts: int = 0
    process: asyncio.subprocess.Process | None = None
    stopping: bool = False
    _task: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def pid(self) -> int | None:
        """The command's process id, which is also that of its session; None while it is not running."""
        return self.process.pid if self.process is not None and self.process.returncode is None else None

    def pids(self) -> set[int]:
        return session_of(self.process.pid) if self.process is not None else set()

    def start(self) -> None:
        self._task = asyncio.create_task(self._supervise(), name=f"supervisor of {self.name}")

    async def _supervise(self) -> None:
        while not self.stopping:
            with self.log.open("ab") as log:
                log.write(f"---- start {self.starts} at {time.strftime('%X')}\n".encode())
                log.flush()
                self.process = await asyncio.create_subprocess_exec(
                    *self.arguments,
                    env=self.environment,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            self.starts += 1
            code = await self.process.wait()
            at = time.monotonic()
            if not self.stopping:
                self.endings.append(Ending(self.name, at, code, await self._clear()))
                await asyncio.sleep(RESTART_SECONDS)

    async def _clear(self) -> tuple[str, ...]:
        """Wait for what the command has started to end too; kill and return what does not."""
        deadline = time.monotonic() + LEFT_BEHIND_SECONDS
        while (pids := self.pids()) and time.monotonic() < deadline:
            if all(is_stopped(pid) for pid in pids):  # by the harness; nothing can end by itself so
                break
            await asyncio.sleep(0.05)
        left = tuple(command_line(pid) for pid in pids if not is_stopped(pid))
        self.kill()
        return left

    def kill(self) -> None:
        """Kill the command and all that it has started, now."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    async def stop(self) -> None:
        """End it in good order, then at once."""
        self.stopping = True
        if self.pid is not None and self.process is not None:
            for pid in self.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self.process.wait()), STOP_SECONDS)
        self.kill()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=5.0)
            self._task.cancel()


class Cluster:
    """Two prefill and two decode engines and a router. As an async context manager nothing of it is left at the end.

    Attributes:
        url: of the router's API.
        urls: of each engine's own API.
        endings: commands that ended though nobody asked them to.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.endings: list[Ending] = []
        self.logs = settings.work / "logs"
        self.temporary = settings.work / "tmp"
        for folder in (self.logs, self.temporary):
            folder.mkdir(parents=True, exist_ok=True)
        http, control, *ports = free_ports(2 + len(ENGINES))
        self.ports = {"router": http} | dict(zip(ENGINES, ports, strict=True))
        self.url = f"http://127.0.0.1:{http}"
        self.urls = {name: f"http://127.0.0.1:{port}" for name, port in zip(ENGINES, ports, strict=True)}
        self.commands = {"router": self._supervised("router", "router", *self._router_flags(control))}
        for name in ENGINES:
            arguments = (str(settings.model), *self._engine_flags(name, control))
            self.commands[name] = self._supervised(name, "engine", *arguments)
        self.http: aiohttp.ClientSession

    async def __aenter__(self) -> Cluster:
        self.http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True))
        for command in self.commands.values():
            command.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self.http.close()
            await asyncio.gather(*(command.stop() for command in self.commands.values()))
        finally:
            for command in self.commands.values():
                command.kill()

    def kill(self) -> None:
        """The last resort of a harness that ends in haste."""
        for command in self.commands.values():
            command.stopping = True
            command.kill()

    @property
    def router_starts(self) -> int:
        return self.commands["router"].starts

    async def get(self, url: str) -> tuple[int, Any]:
        """Return status and JSON of a GET. Raises aiohttp.ClientError, OSError or TimeoutError."""
        async with self.http.get(url, timeout=POLL) as reply:
            return reply.status, await reply.json(content_type=None)

    async def engines(self) -> dict[str, dict[str, Any]]:
        """Return what the router says of each engine that is ready; nothing if the router does not answer."""
        try:
            status, body = await self.get(f"{self.url}/tandem/engines")
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
            return {}
        listed = body["engines"] if status == 200 else []
        return {engine["engine_id"]: engine for engine in listed if engine["state"] == "ready"}

    async def not_whole(self) -> str | None:
        """Return what is missing for all paths to be there, or None."""
        for name, command in self.commands.items():
            if command.pid is None or is_stopped(command.pid):
                return f"{name} is not running"
        for name, url in {"router": self.url, **self.urls}.items():
            try:
                status, _ = await self.get(f"{url}/health")
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
                return f"{name} does not tell its health: {error!r}"
            if status != 200:
                return f"the health of {name} is {status}"
        engines = await self.engines()
        for name in ENGINES:
            if (reason := self._not_alive(name, engines.get(name))) is not None:
                return reason
        return self._unpaired(engines)

    def _not_alive(self, name: str, engine: dict[str, Any] | None) -> str | None:
        if engine is None:
            return f"the router does not call {name} ready"
        session = self.commands[name].pid
        pids = [rank["pid"] for rank in engine["ranks"]]
        if session is None or len(pids) != ENGINES[name].ranks:
            return f"{name} has no ranks"
        gone = [pid for pid in pids if not is_alive(pid) or is_stopped(pid) or not in_session(pid, session)]
        return f"{name} has lost ranks" if gone else None

    def _unpaired(self, engines: dict[str, dict[str, Any]]) -> str | None:
        for decode in (name for name, shape in ENGINES.items() if shape.role == "decode"):
            ready = {(p["engine_id"], p["incarnation"]) for p in engines[decode]["peers"] if p["state"] == "ready"}
            for prefill in (name for name, shape in ENGINES.items() if shape.role == "prefill"):
                if (prefill, engines[prefill]["incarnation"]) not in ready:
                    return f"{decode} has no session with {prefill}"
        return None

    async def wait_whole(self, seconds: float) -> str | None:
        """Wait until all paths are there; what is still missing if they are not in time."""
        deadline = time.monotonic() + seconds
        while True:
            reason = await self.not_whole()
            if reason is None or time.monotonic() > deadline:
                return reason
            await asyncio.sleep(0.1)

    def usable(self, engines: dict[str, dict[str, Any]]) -> list[str]:
        """Return the engines which the router calls ready and whose ranks are alive and running."""
        return [name for name in ENGINES if self._not_alive(name, engines.get(name)) is None]

    async def api_process(self, name: str) -> int | None:
        """Return the process that answers HTTP for an engine or the router."""
        command = self.commands[name]
        held = await listeners(self.ports[name])
        return next((pid for pid in sorted(held) if pid != command.pid and pid in command.pids()), None)

    def fork_server(self, name: str) -> int | None:
        """Return the process of which a command's other children are forks: they have its command line."""
        command = self.commands[name]
        servers = (pid for pid in command.pids() if "forkserver" in command_line(pid))
        return next((pid for pid in servers if parent_of(pid) == command.pid), None)

    def owner_of(self, pid: int) -> str | None:
        """Return the command whose session a process is in."""
        for name, command in self.commands.items():
            if command.pid is not None and in_session(pid, command.pid):
                return name
        return None

    def _common_flags(self) -> list[str]:
        settings = self.settings
        common = flags(
            lease_ttl=settings.lease_ttl, request_timeout=settings.request_timeout, log_level=settings.log_level
        )
        key = flags(cluster_key_file=settings.work / "cluster.key") if settings.key else ()
        return [*common, *key]

    def _router_flags(self, control: int) -> list[str]:
        return [*flags(host="127.0.0.1", port=self.ports["router"], control_port=control), *self._common_flags()]

    def _engine_flags(self, name: str, control: int) -> list[str]:
        shape, settings = ENGINES[name], self.settings
        own = flags(
            role=shape.role,
            tp=1 if name == settings.pipeline else shape.ranks,
            pp=shape.ranks if name == settings.pipeline else 1,
            engine_id=name,
            connector=settings.connector,
            router=f"127.0.0.1:{control}",
            host="127.0.0.1",
            port=self.ports[name],
            kv_memory=settings.kv_memory // shape.ranks,
            dtype="float32",
            max_model_len=640,
            max_num_seqs=16,
            max_batched_tokens=64,
            threads=1,
            start_timeout=60,
        )
        return [*own, *self._common_flags()]

    def _supervised(self, name: str, command: str, *arguments: str) -> Supervised:
        environment = clean_environment() | {"TMPDIR": str(self.temporary), "HF_HUB_OFFLINE": "1"}
        command_line_of_it = tandem_command(command, *arguments)
        return Supervised(name, command_line_of_it, self.logs / f"{name}.log", environment, self.endings)
