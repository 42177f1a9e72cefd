"""The store in which the ranks of an engine meet: a file on one node, else a TCP server in rank 0's process.

Where its methods fail, the process that serves it is gone; they raise RuntimeError.
"""

from __future__ import annotations

import functools
import socket
import time
from datetime import timedelta

from torch.distributed import (  # type: ignore[attr-defined]  # public, but not in __all__
    FileStore,
    PrefixStore,
    Store,
    TCPStore,
)

from tandem.deadlines import call_within
from tandem.engine.timeouts import LAST_WORD_SECONDS
from tandem.errors import StartError
from tandem.wire.messages import Address

__all__ = ["Store", "clone", "first_line", "open_store", "subspace", "wait_for_count", "wait_for_key"]

POLL_SECONDS = 0.01
KNOCK_SECONDS = 0.2
CONNECT_SECONDS = 2.0


def open_store(meeting: Address | str, rank: int, timeout: float) -> Store:
    """Open the store: of several nodes at --master, where rank 0 serves it; of a single node in a file.

    Raises StartError, in bounded time, that says what is wrong with --master.
    """
    if isinstance(meeting, str):
        return FileStore(meeting, -1)
    if rank == 0:
        return _serve(meeting, timeout)
    _wait_for_listener(meeting, timeout)
    try:
        return _tcp_store(meeting, timeout, is_server=False)
    except TimeoutError:
        raise StartError(
            f"--master {meeting}: something listens there, but no meeting of ranks within {timeout:.0f} s;"
            " is another program on that port, or did node 0 not start?"
        ) from None
    except (RuntimeError, ValueError) as error:
        raise StartError(f"--master {meeting} does not serve a meeting of ranks: {first_line(error)}") from None


def _serve(master: Address, timeout: float) -> Store:
    try:
        return _tcp_store(master, timeout, is_server=True)
    except TimeoutError:
        why = f"no answer in {timeout:.0f} s"
    except (RuntimeError, ValueError) as error:
        why = first_line(error)
    raise StartError(
        f"node 0 cannot listen on --master {master}: is that an address of this node, and the port free? ({why})"
    )


def _tcp_store(master: Address, timeout: float, *, is_server: bool) -> Store:
    """Raises TimeoutError: with a server that takes the connection and never answers, TCPStore waits for ever."""
    wait = timedelta(seconds=max(timeout, 1.0))
    make = functools.partial(
        TCPStore, master.host, master.port, is_master=is_server, wait_for_workers=False, timeout=wait
    )
    return call_within(timeout, make, "store")


def _wait_for_listener(master: Address, timeout: float) -> None:
    """Return once somebody listens there: the store's own client keeps to no deadline while nobody does."""
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


def subspace(store: Store, prefix: str) -> Store:
    """Return a store of its own within `store`."""
    return PrefixStore(prefix, store)


def clone(store: Store) -> Store:
    """Return another connection to the same store: one connection serves one thread at a time."""
    return store.clone()  # type: ignore[attr-defined,no-any-return]  # not in torch's stubs


def wait_for_key(store: Store, key: str, deadline: float) -> bool:
    """Return whether the key is there before `deadline`.

    Polls, as FileStore does itself: its own wait raises the same error for a timeout as for anything else.
    """
    while not store.check([key]):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def wait_for_count(store: Store, key: str, count: int) -> None:
    """Wait until the counter `key` has come to `count`, so that the store may go; LAST_WORD_SECONDS at most."""
    deadline = time.monotonic() + LAST_WORD_SECONDS
    while store.add(key, 0) < count and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def first_line(error: Exception) -> str:
    """Return the first line of an error of torch; a C++ stack trace follows it."""
    return str(error).splitlines()[0][:200]
