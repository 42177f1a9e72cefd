"""The meeting of an engine's ranks before they can talk, in a store that node 0 serves.

Every rank announces itself in the store. Rank 0 judges each arrival: one that does not fit ends the start at once, on
all nodes, with one sentence; so does a rank that is missing at the deadline. Only then is the process group made,
which could say no more than that it timed out.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable

import msgspec

from tandem.engine.store import Store, first_line, wait_for_count, wait_for_key
from tandem.engine.timeouts import LAST_WORD_SECONDS
from tandem.errors import RankLost, StartError
from tandem.transfer.identity import RankRecord, check_agreement

SHAPE = ("version", "nnodes", "tp", "pp", "device")
"""Fields that must be equal for there to be a world group in which the rest can be compared."""


class _Arrival(msgspec.Struct, frozen=True):
    """A rank that has come. `mark` tells two processes with one rank apart."""

    mark: str
    record: RankRecord


class _Admitted(msgspec.Struct, frozen=True, tag="admitted"):
    """Rank 0's verdict that these form the engine: descriptions of processes, by mark."""

    processes: dict[str, str]


class _Rejected(msgspec.Struct, frozen=True, tag="rejected"):
    """Rank 0's verdict that the start has failed."""

    error: str


_Verdict = _Admitted | _Rejected


def meet(store: Store, record: RankRecord, world_size: int, timeout: float) -> None:
    """Return once all ranks are there and of one shape.

    Raises:
        StartError: on all ranks alike and in bounded time.
        RankLost: node 0, which serves the store, is gone.
    """
    deadline = time.monotonic() + timeout
    arrival = _Arrival(uuid.uuid4().hex, record)
    number = store.add("arrivals", 1)
    store.set(f"arrival/{number}", msgspec.json.encode(arrival).decode())
    if record.rank == 0 and record.node_rank == 0:
        verdict = _judge(store, record, world_size, timeout, deadline)
        store.set("verdict", msgspec.json.encode(verdict).decode())
        if isinstance(verdict, _Rejected):
            wait_for_count(store, "heard", store.add("arrivals", 0) - 1)
    else:
        verdict = _await_verdict(store, timeout, deadline + LAST_WORD_SECONDS)
        store.add("heard", 1)
    if isinstance(verdict, _Rejected):
        raise StartError(verdict.error)
    if arrival.mark not in verdict.processes:
        same_rank = [process for process in verdict.processes.values() if process.startswith(f"rank {record.rank} ")]
        raise StartError(
            f"the engine at --master is whole already: {same_rank[0] if same_rank else 'all its ranks'} runs, and this"
            f" is {_process(record)}; every node needs its own --node-rank, and every engine a --master of its own"
        )


def _judge(store: Store, own: RankRecord, world_size: int, timeout: float, deadline: float) -> _Verdict:
    """Look at each arrival until all ranks are there, one does not fit, or the time is over."""
    arrived: dict[int, _Arrival] = {}
    number = 0
    while len(arrived) < world_size:
        number += 1
        if not wait_for_key(store, f"arrival/{number}", deadline):
            return _Rejected(_missing(own, [arrival.record for arrival in arrived.values()], world_size, timeout))
        try:
            arrival = msgspec.json.decode(store.get(f"arrival/{number}"), type=_Arrival)
            check_agreement([own, arrival.record], SHAPE)
        except msgspec.DecodeError as error:
            return _Rejected(f"something that is not a rank of this version came to --master: {error}")
        except StartError as error:
            return _Rejected(str(error))
        twin = arrived.get(arrival.record.rank)
        if twin is not None:
            return _Rejected(
                f"one rank was started twice: {_process(twin.record)} and {_process(arrival.record)};"
                " every node needs its own --node-rank"
            )
        arrived[arrival.record.rank] = arrival
    return _Admitted({arrival.mark: _process(arrival.record) for arrival in arrived.values()})


def _process(record: RankRecord) -> str:
    return f"rank {record.rank} on {record.node}, pid {record.pid}"


def _missing(own: RankRecord, arrived: list[RankRecord], world_size: int, timeout: float) -> str:
    per_node = world_size // own.nnodes
    missing = sorted(set(range(world_size)) - {record.rank for record in arrived})
    nodes = sorted({rank // per_node for rank in missing})
    present = sorted({record.node for record in arrived})
    return (
        f"{_plural('rank', missing)} of {_plural('node', nodes)} did not come within {timeout:.0f} s;"
        f" there were {', '.join(present)}. Start all {own.nnodes} nodes with the same --master, or check the network"
    )


def _plural(word: str, numbers: Iterable[int]) -> str:
    listed = [str(n) for n in numbers]
    shown = ", ".join(listed[:8]) + (" ..." if len(listed) > 8 else "")
    return f"{word} {shown}" if len(listed) == 1 else f"{word}s {shown}"


def _await_verdict(store: Store, timeout: float, deadline: float) -> _Verdict:
    try:
        if wait_for_key(store, "verdict", deadline):
            return msgspec.json.decode(store.get("verdict"), type=_Verdict)  # type: ignore[no-any-return]
    except msgspec.DecodeError:
        raise StartError("node 0 runs another version: what it said cannot be read") from None
    except RuntimeError as error:
        raise RankLost(f"node 0 was lost while the ranks came together ({first_line(error)})") from None
    raise StartError(f"node 0 did not say within {timeout:.0f} s whether all ranks are there; see its log")
