"""Hostile inputs of all kinds against a cluster, in turn and at a bounded rate, and a look at it between them."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.fakes import Defect
from tests.fuzz.live.cluster import FuzzedCluster, fuzzed_cluster
from tests.fuzz.live.members import Members
from tests.fuzz.live.raw import RawClients

MOST_PER_SECOND = 1500.0
LOOK_EVERY = 1000
REMEMBERED = 20
LINES_SHOWN = 80
KINDS = ("http", "control", "peer", "rank")


@dataclass(frozen=True)
class LiveReport:
    """What became of a cluster's inputs. `grown`: MiB by which its largest process grew."""

    inputs: dict[str, int]
    served: int
    slowest: float
    grown: float
    log_bytes: int


def attack(folder: Path, inputs: int, seed: int, *, keyed: bool) -> LiveReport:
    """Send this many inputs. Raises Defect with the last of them."""
    with fuzzed_cluster(folder, keyed=keyed) as cluster:
        rng = random.Random(f"{seed}/{keyed}")
        raw, members = RawClients(cluster, rng), Members(cluster, rng)
        last: list[bytes] = []
        started = time.monotonic()
        try:
            for number in range(inputs):
                time.sleep(max(0.0, started + number / MOST_PER_SECOND - time.monotonic()))
                last = [*last[-REMEMBERED:], _one(raw, members, rng)]
                if number % LOOK_EVERY == LOOK_EVERY - 1:
                    cluster.check()
                    members.check()
            cluster.check()
            members.check()
        except (Defect, OSError) as error:
            time.sleep(1.0)  # the log is written by processes that end
            shown = "\n".join(repr(data[:500]) for data in last)
            log = "\n".join(cluster.deployment.log.splitlines()[-LINES_SHOWN:])
            raise Defect(
                f"seed {seed}, after {cluster.inputs}: {error}\nthe last inputs:\n{shown}\nthe log:\n{log}"
            ) from error
        finally:
            raw.close()
            members.close()
        return _report(cluster)


def _one(raw: RawClients, members: Members, rng: random.Random) -> bytes:
    kind = rng.choice(KINDS)
    if rng.random() < 0.02:
        members.decoy()
    if kind == "http" or rng.random() < 0.2:
        return raw.feed(kind)
    return members.feed(kind)


def _report(cluster: FuzzedCluster) -> LiveReport:
    witness = cluster.witness
    grown = max(cluster.growth_mib().values())
    return LiveReport(cluster.inputs, witness.asked.total(), witness.slowest, grown, len(cluster.deployment.log))
