"""How the ranks of an engine find each other before they can talk: through a store that node 0 serves.

Every rank announces itself in the store. Rank 0 looks at each arrival: one that does not fit ends the start at once,
on all nodes, with one sentence; so does a rank that is missing at the deadline. Only then is the process group made,
which could say no more than that it timed out.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import msgspec
from torch import distributed as dist
from torch._C import _distributed_c10d as stores

from tandem.errors import StartError
from tandem.transfer.identity import RankRecord, check_agreement
from tandem.wire.messages import Address

SHAPE = ("version", "nnodes", "tp", "pp")
"""What has to be equal for there to be a world group in which the rest can be compared."""

LAST_WORD_SECONDS = 3.0
STEP_SECONDS = 1.0


def open_store(master: Address | None, path: str | None, rank: int, timeout: float) -> Any:
    """The store of a multi-node engine (TCP, served by rank 0) or of one on a single node (a file)."""
    if master is None:
        assert path is not None
        return stores.FileStore(path, -1)
    try:
        return stores.TCPStore(
            master.host,
            master.port,
            is_master=rank == 0,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout),
        )
    except (RuntimeError, ValueError) as error:
        if rank == 0:
            raise StartError(f"node 0 cannot listen on --master {master}: {_brief(error)}") from None
        raise StartError(
            f"--master {master} could not be reached within {timeout:.0f} s: is node 0 started, and is this its address?"
            f" ({_brief(error)})"
        ) from None


def meet(store: Any, record: RankRecord, world_size: int, timeout: float) -> None:
    """Returns once all ranks are there and of one shape. Raises StartError, on all ranks alike, in bounded time."""
    deadline = time.monotonic() + timeout
    number = store.add("arrivals", 1)
    store.set(f"arrival/{number}", msgspec.json.encode(record).decode())
    if record.rank == 0 and record.node_rank == 0:
        verdict = _judge(store, record, world_size, timeout, deadline)
        store.set("verdict", verdict)
        if verdict:
            _let_everybody_hear(store)
    else:
        verdict = _await_verdict(store, timeout, deadline + LAST_WORD_SECONDS)
        store.add("heard", 1)
    if verdict:
        raise StartError(verdict)


def _judge(store: Any, own: RankRecord, world_size: int, timeout: float, deadline: float) -> str:
    """What rank 0 makes of the arrivals: an error, or nothing."""
    arrived: dict[int, RankRecord] = {}
    number = 0
    while len(arrived) < world_size:
        number += 1
        if not _wait(store, f"arrival/{number}", deadline):
            return _missing(own, arrived, world_size, timeout)
        try:
            record = msgspec.json.decode(store.get(f"arrival/{number}"), type=RankRecord)
            check_agreement([own, record], SHAPE)
        except msgspec.DecodeError as error:
            return f"something that is not a rank of this version came to --master: {error}"
        except StartError as error:
            return str(error)
        twin = arrived.get(record.rank)
        if twin is not None:
            return (
                f"rank {record.rank} was started twice: on {twin.node}, pid {twin.pid}, and on {record.node},"
                f" pid {record.pid}; every node needs its own --node-rank"
            )
        arrived[record.rank] = record
    return ""


def _missing(own: RankRecord, arrived: dict[int, RankRecord], world_size: int, timeout: float) -> str:
    per_node = world_size // own.nnodes
    missing = sorted(set(range(world_size)) - set(arrived))
    nodes = sorted({rank // per_node for rank in missing})
    present = sorted({record.node for record in arrived.values()})
    return (
        f"{_plural('rank', missing)} of {_plural('node', nodes)} did not come within {timeout:.0f} s;"
        f" there were {', '.join(present)}. Start all {own.nnodes} nodes with the same --master, or check the network"
    )


def _plural(word: str, numbers: Iterable[int]) -> str:
    listed = [str(n) for n in numbers]
    shown = ", ".join(listed[:8]) + (" ..." if len(listed) > 8 else "")
    return f"{word} {shown}" if len(listed) == 1 else f"{word}s {shown}"


def _await_verdict(store: Any, timeout: float, deadline: float) -> str:
    try:
        if _wait(store, "verdict", deadline):
            return str(store.get("verdict").decode())
    except RuntimeError as error:
        raise StartError(f"node 0 was lost while the ranks came together ({_brief(error)})") from None
    raise StartError(f"node 0 did not say within {timeout:.0f} s whether all ranks are there; see its log")


def _wait(store: Any, key: str, deadline: float) -> bool:
    """Whether the key came in time. In short waits, so that the process can be stopped meanwhile."""
    while (left := deadline - time.monotonic()) > 0:
        try:
            store.wait([key], timedelta(seconds=min(left, STEP_SECONDS)))
            return True
        except dist.DistStoreError:
            continue
        except RuntimeError as error:
            if "timeout" not in str(error).lower():
                raise
    return False


def _let_everybody_hear(store: Any) -> None:
    """The store ends with this process, so wait until the others have read the verdict; bounded."""
    others = store.add("arrivals", 0) - 1
    deadline = time.monotonic() + LAST_WORD_SECONDS
    while store.add("heard", 0) < others and time.monotonic() < deadline:
        time.sleep(0.02)


def _brief(error: Exception) -> str:
    return str(error).splitlines()[0][:200]
