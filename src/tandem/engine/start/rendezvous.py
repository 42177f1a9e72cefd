"""How the ranks of an engine find each other before they can talk: through a store that node 0 serves.

Every rank announces itself in the store. Rank 0 looks at each arrival: one that does not fit ends the start at once,
on all nodes, with one sentence; so does a rank that is missing at the deadline. Only then is the process group made,
which could say no more than that it timed out.
"""

from __future__ import annotations

import functools
import logging
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import msgspec
from torch import distributed as dist
from torch._C import _distributed_c10d as stores

from tandem.deadlines import call_within
from tandem.errors import StartError
from tandem.transfer.identity import RankRecord, check_agreement
from tandem.wire.messages import Address

log = logging.getLogger(__name__)

SHAPE = ("version", "nnodes", "tp", "pp", "device")
"""What has to be equal for there to be a world group in which the rest can be compared."""

LAST_WORD_SECONDS = 3.0
STEP_SECONDS = 1.0
KNOCK_SECONDS = 0.2
CONNECT_SECONDS = 2.0


class _Arrival(msgspec.Struct, frozen=True):
    """`mark` tells two processes with one rank apart."""

    mark: str
    record: RankRecord


class _Verdict(msgspec.Struct, frozen=True):
    """What rank 0 made of the arrivals: an error, or the marks and places of the ranks that form the engine."""

    error: str
    members: dict[str, str] = {}


def open_store(master: Address | None, path: str | None, rank: int, timeout: float) -> Any:
    """The store of a multi-node engine (TCP, served by rank 0) or of one on a single node (a file)."""
    if master is None:
        assert path is not None
        return stores.FileStore(path, -1)
    if rank != 0:
        _knock(master, timeout)
    wait = timedelta(seconds=max(timeout, STEP_SECONDS))
    make = functools.partial(
        stores.TCPStore, master.host, master.port, is_master=rank == 0, wait_for_workers=False, timeout=wait
    )
    try:
        return call_within(timeout, make, "store")
    except TimeoutError:
        if rank == 0:
            raise StartError(_not_here(master, f"no answer in {timeout:.0f} s")) from None
        raise StartError(
            f"--master {master}: something listens there, but no meeting of ranks within {timeout:.0f} s;"
            " is another program on that port, or did node 0 not start?"
        ) from None
    except (RuntimeError, ValueError) as error:
        if rank == 0:
            raise StartError(_not_here(master, _brief(error))) from None
        raise StartError(f"--master {master} does not serve a meeting of ranks: {_brief(error)}") from None


def _not_here(master: Address, why: str) -> str:
    return f"node 0 cannot listen on --master {master}: is that an address of this node, and the port free? ({why})"


def _knock(master: Address, timeout: float) -> None:
    """Returns once somebody listens there: the store's own client keeps to no deadline."""
    deadline = time.monotonic() + timeout
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            socket.create_connection((master.host, master.port), timeout=min(left, CONNECT_SECONDS)).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(min(KNOCK_SECONDS, max(0.0, deadline - time.monotonic())))
    raise StartError(
        f"--master {master} could not be reached within {timeout:.0f} s ({reason}): is node 0 started,"
        " and is that its address?"
    )


def meet(store: Any, record: RankRecord, world_size: int, timeout: float) -> None:
    """Returns once all ranks are there and of one shape. Raises StartError, on all ranks alike, in bounded time."""
    deadline = time.monotonic() + timeout
    arrival = _Arrival(uuid.uuid4().hex, record)
    number = store.add("arrivals", 1)
    store.set(f"arrival/{number}", msgspec.json.encode(arrival).decode())
    if record.rank == 0 and record.node_rank == 0:
        verdict = _judge(store, record, world_size, timeout, deadline)
        store.set("verdict", msgspec.json.encode(verdict).decode())
        if verdict.error:
            _let_everybody_hear(store, store.add("arrivals", 0) - 1, "heard")
    else:
        verdict = _await_verdict(store, timeout, deadline + LAST_WORD_SECONDS)
        store.add("heard", 1)
    if verdict.error:
        raise StartError(verdict.error)
    if arrival.mark not in verdict.members:
        taken = next((place for place in verdict.members.values() if place.startswith(f"rank {record.rank} ")), "")
        raise StartError(
            f"the engine at --master is whole already: {taken or 'all its ranks'} runs, and this is"
            f" {_place(record)}; every node needs its own --node-rank, and every engine a --master of its own"
        )


def _judge(store: Any, own: RankRecord, world_size: int, timeout: float, deadline: float) -> _Verdict:
    arrived: dict[int, _Arrival] = {}
    number = 0
    while len(arrived) < world_size:
        number += 1
        if not _wait(store, f"arrival/{number}", deadline):
            records = {rank: arrival.record for rank, arrival in arrived.items()}
            return _Verdict(_missing(own, records, world_size, timeout))
        try:
            arrival = msgspec.json.decode(store.get(f"arrival/{number}"), type=_Arrival)
            check_agreement([own, arrival.record], SHAPE)
        except msgspec.DecodeError as error:
            return _Verdict(f"something that is not a rank of this version came to --master: {error}")
        except StartError as error:
            return _Verdict(str(error))
        twin = arrived.get(arrival.record.rank)
        if twin is not None:
            return _Verdict(
                f"one rank was started twice: {_place(twin.record)} and {_place(arrival.record)};"
                " every node needs its own --node-rank"
            )
        arrived[arrival.record.rank] = arrival
    return _Verdict("", {arrival.mark: _place(arrival.record) for arrival in arrived.values()})


def _place(record: RankRecord) -> str:
    return f"rank {record.rank} on {record.node}, pid {record.pid}"


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


def _await_verdict(store: Any, timeout: float, deadline: float) -> _Verdict:
    try:
        if _wait(store, "verdict", deadline):
            return msgspec.json.decode(store.get("verdict"), type=_Verdict)
    except msgspec.DecodeError:
        raise StartError("node 0 runs another version: what it said cannot be read") from None
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


def _let_everybody_hear(store: Any, others: int, key: str) -> None:
    """The store ends with this process, so wait until so many others have counted themselves; bounded."""
    deadline = time.monotonic() + LAST_WORD_SECONDS
    while store.add(key, 0) < others and time.monotonic() < deadline:
        time.sleep(0.02)


def _brief(error: Exception) -> str:
    return str(error).splitlines()[0][:200]


class StartFailureWatch:
    """While an engine starts, a rank that fails takes the others along and tells them why.

    Without it they would wait in a collective until that times out, each with an error of its own.

    Args:
        store: a connection of its own to the store in which the ranks met.
        others: how many other ranks there are.
        on_failure: called, in a thread of this object, with what another rank said.
    """

    def __init__(self, store: Any, others: int, on_failure: Callable[[str], None]) -> None:
        self._store = store
        self._others = others
        self._on_failure = on_failure
        self._over = threading.Event()
        self._counted = False
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, name="shared fate", daemon=True).start()

    def fail(self, text: str, *, serves_store: bool) -> None:
        """This rank fails. Returns once its process may end: where it serves the store, when the others know."""
        self._over.set()
        if not self._lock.acquire(timeout=LAST_WORD_SECONDS):
            return  # the watching thread waits for a store that does not answer
        try:
            self._store.compare_set("failure", "", text)  # the first reason stays: what follows are its consequences
            self._count()
            if serves_store:
                _let_everybody_hear(self._store, self._others + 1, "fate")
        except RuntimeError as error:
            log.info("the other ranks cannot be told: %s", _brief(error))  # the rank that serves the store has gone
        finally:
            self._lock.release()

    def end(self) -> None:
        """The start is over."""
        self._over.set()

    def _count(self) -> None:
        if not self._counted:
            self._counted = True
            self._store.add("fate", 1)

    def _watch(self) -> None:
        while not self._over.wait(STEP_SECONDS / 4):
            try:
                with self._lock:
                    text = self._store.get("failure").decode() if self._store.check(["failure"]) else None
                    if text is not None:
                        self._count()
            except RuntimeError:
                text = "node 0 was lost while the engine started; see its log"
            if text is not None and not self._over.is_set():
                self._on_failure(text)
                return
