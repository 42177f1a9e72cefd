"""How long the processes and threads of an engine wait for each other, and which wait must outlast which."""

from __future__ import annotations

# --- while the engine starts; all but these wait for --start-timeout ---------------------------------------------

COLLECTIVE_SECONDS = 60.0
"""A collective waits at least this long, also with a short --start-timeout: it may be for a rank that loads weights."""

TRANSPORT_SECONDS = 60.0
"""A transport starts in less than a second; with NIXL it may have to look for network devices."""

PEERS_SECONDS = 300.0
"""A transfer thread, for the other ranks' memory. The gather that brings it has a deadline of its own and is to tell
why it failed, so this must be longer than COLLECTIVE_SECONDS."""

FOLLOWERS_SECONDS = 30.0
"""The leader, for its followers to connect. They come at once from the collective that told them the address."""

LAST_WORD_SECONDS = 3.0
"""Rank 0 serves the store in which the ranks meet: before it ends with an error, for the others to read that error."""

# --- when a rank is lost -----------------------------------------------------------------------------------------

CAUSE_SECONDS = 2.0
"""A collective that fails says less than the rank that knows why: time for word from that rank to come."""

STUCK_SECONDS = 5.0
"""A step loop that does not end this long after a rank was lost hangs in a collective with that rank, and its process
is ended by another thread. Longer than CAUSE_SECONDS, HALT_SECONDS and EVENT_LOOP_SECONDS together, which a step loop
that does not hang may take to end with a better reason."""

# --- when the engine ends; in all less than processes.TERM_SECONDS, after which its owner kills it ---------------

HALT_SECONDS = 0.5
"""The leader, for its followers to go, so that its own end does not overtake its Halt."""

EVENT_LOOP_SECONDS = 2.0
"""The step loop, for the event loop to say goodbye to frontends and peers."""
