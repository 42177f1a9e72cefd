"""Waits between the processes and threads of an engine, in seconds, and which of them must outlast which.

Beside these, the start is bounded by --start-timeout, and the loss of a rank is noticed by ZeroMQ's heartbeats
(wire/sockets.py) or by the silence of its transfer thread (transfer/thread).
"""

from __future__ import annotations

# --- while the engine starts -------------------------------------------------------------------------------------

COLLECTIVE_SECONDS = 60.0
"""The least that a collective waits, also with a short --start-timeout: other ranks may still load their weights."""

TRANSPORT_SECONDS = 60.0
"""For the transport of a rank. It takes less than a second, unless NIXL finds many network devices to look at."""

PEERS_SECONDS = 300.0
"""Of a transfer thread, for the memory of the other ranks. If the gather that brings it fails, that is to be the error,
so this is longer than COLLECTIVE_SECONDS."""

FOLLOWERS_SECONDS = 30.0
"""Of the leader, for its followers to connect. They come at once from the collective that gave them the address."""

LAST_WORD_SECONDS = 3.0
"""Of rank 0 before it ends with an error, for the others to read that error in the store that it serves."""

# --- when a rank is lost -----------------------------------------------------------------------------------------

CAUSE_SECONDS = 2.0
"""After a collective has failed, for the news of why: the rank that knows it says more than the collective."""

STUCK_SECONDS = 5.0
"""After the loss of a rank, until a step loop that has not ended is taken to hang in a collective with that rank; then
another thread ends the process. Longer than CAUSE_SECONDS, HALT_SECONDS and EVENT_LOOP_SECONDS together, within which
a step loop that does not hang ends with a better reason."""

# --- when the engine ends; together less than processes.TERM_SECONDS, after which the owner kills the ranks ------

HALT_SECONDS = 0.5
"""Of the leader, for its followers to go: its own end must not overtake its Halt, or they take it for a loss."""

GOODBYE_SECONDS = 1.5
"""Of the event loop, for frontends to answer its goodbye: a process that ends takes along what it has not sent yet."""

EVENT_LOOP_SECONDS = 2.0
"""Of the step loop, for the event loop to say goodbye to frontends and peers."""
