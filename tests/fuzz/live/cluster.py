"""A cluster to be fuzzed: its ports by what they take, and what must be true of it all the while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tandem.wire.keys import ClusterKey, load_key
from tests.fuzz.fakes import Defect
from tests.fuzz.live.ports import Port, listening, resident_mib
from tests.fuzz.live.witness import Witness
from tests.support.deployment import Deployment, flags, run_tandem
from tests.support.families import FAMILIES
from tests.support.http import Http
from tests.support.processes import is_alive

MOST_GROWTH_MIB = 250.0
MOST_LOG_BYTES_PER_INPUT = 600
MOST_LOG_LINE = 20_000
SHAPE = flags(connector="tcp", decode_tp=2, kv_memory="8MiB", max_num_seqs=16, max_waiting=64, lease_ttl=3)


@dataclass
class FuzzedCluster:
    """A prefill engine, a decode engine of two ranks, and a router.

    Attributes:
        ports: every port that one of its processes listens on, by kind: "http", "control", "peer" or "rank".
        inputs: hostile ones so far, by kind.
    """

    deployment: Deployment
    key: ClusterKey | None
    witness: Witness
    ports: dict[str, list[Port]]
    engines: dict[str, dict[str, Any]]
    pids: dict[int, float] = field(default_factory=dict)
    inputs: dict[str, int] = field(default_factory=dict)

    def count(self, kind: str, inputs: int = 1) -> None:
        self.inputs[kind] = self.inputs.get(kind, 0) + inputs

    def growth_mib(self) -> dict[int, float]:
        return {pid: resident_mib(pid) - before for pid, before in self.pids.items()}

    def name(self, pid: int) -> str:
        """Return what a process is, for people."""
        for engine_id, engine in self.engines.items():
            for rank in engine["ranks"]:
                if rank["pid"] == pid:
                    return f"{engine_id} rank {rank['rank']}"
        http = {port.pid: port.number for port in self.ports["http"]}
        return f"API at port {http[pid]}" if pid in http else f"process {pid}"

    def check(self) -> None:
        """Raise Defect for whatever is not as it should be. The log is looked at once the cluster has ended."""
        gone = [pid for pid in self.pids if not is_alive(pid)]
        if gone:
            raise Defect(f"processes {gone} have ended:\n{self.deployment.log[-8000:]}")
        missing = {port for ports in self.ports.values() for port in ports} - set(listening(self.pids))
        if missing:
            raise Defect(f"nobody listens any more on {missing}")
        if self.witness.complaints:
            raise Defect("valid requests were not served:\n" + "\n".join(self.witness.complaints[:10]))
        grown = {self.name(pid): round(mib) for pid, mib in self.growth_mib().items() if mib > MOST_GROWTH_MIB}
        if grown:
            raise Defect(f"processes have grown by so many MiB: {grown}")
        self._check_log()

    def _check_log(self) -> None:
        log = self.deployment.log
        if "Traceback (most recent call last)" in log:
            at = log.index("Traceback (most recent call last)")
            raise Defect(f"there is a traceback in the log:\n{log[max(0, at - 1000) : at + 4000]}")
        most = 200_000 + MOST_LOG_BYTES_PER_INPUT * (sum(self.inputs.values()) + self.witness.asked.total())
        if len(log) > most:
            raise Defect(f"{len(log)} bytes of log for {self.inputs}; the last:\n{log[-3000:]}")
        if longest := [line for line in log.splitlines() if len(line) > MOST_LOG_LINE]:
            raise Defect(f"a log line of {len(longest[0])} characters: {longest[0][:500]}")


@contextmanager
def fuzzed_cluster(folder: Path, *, keyed: bool) -> Iterator[FuzzedCluster]:
    """Start a cluster of a small random model, with a witness; both are ended with the block, whatever happens."""
    model = FAMILIES["qwen3"].write(folder / "model")
    arguments: list[str | Path] = [model, *SHAPE]
    key = None
    if keyed:
        assert run_tandem("keygen", folder / "key").code == 0
        key = load_key(folder / "key")
        arguments += ["--cluster-key-file", folder / "key"]
    with Deployment(*arguments) as deployment:
        engines = deployment.engines()
        doors = {"router": deployment.http} | {name: deployment.engine(name) for name in engines}
        witness = Witness(doors)
        witness.start()
        try:
            cluster = FuzzedCluster(deployment, key, witness, _by_kind(deployment, doors, engines), engines)
            cluster.pids = {pid: resident_mib(pid) for pid in deployment.pids}
            yield cluster
        finally:
            witness.stop()
        cluster.check()


def _by_kind(
    deployment: Deployment, doors: dict[str, Http], engines: dict[str, dict[str, Any]]
) -> dict[str, list[Port]]:
    http = {urlsplit(door.url).port for door in doors.values()}
    peer = {int(engine["peer_address"].rpartition(":")[2]) for engine in engines.values()}
    ports = listening(deployment.pids)
    frontends = {port.pid for port in ports if port.number in http}
    kinds: dict[str, list[Port]] = {"http": [], "control": [], "peer": [], "rank": []}
    for port in ports:
        inside = "control" if port.pid in frontends else "rank"
        kinds["http" if port.number in http else "peer" if port.number in peer else inside].append(port)
    return kinds
