"""The prefill engines that several routers introduce. Pure."""

from __future__ import annotations

from tandem.wire.engine_status import MAX_PEERS
from tandem.wire.messages import Introduce, PeerAddress


class Introductions:
    """What each frontend has introduced last. One that has restarted knows few engines, and says so: it must not end
    the sessions that the requests of another one need.
    """

    def __init__(self) -> None:
        self._of_frontend: dict[int, list[PeerAddress]] = {}

    def add(self, frontend: int, message: Introduce) -> Introduce:
        """Return the engines of all frontends, each once, now that one has told its own."""
        self._of_frontend[frontend] = message.peers
        peers = {peer.identity: peer for introduced in self._of_frontend.values() for peer in introduced}
        return Introduce(list(peers.values())[:MAX_PEERS])

    def forget(self, frontend: int) -> None:
        """A frontend is gone. What it alone knew is dropped with the next introduction by another one."""
        self._of_frontend.pop(frontend, None)
