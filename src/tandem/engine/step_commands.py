"""Commands of the leader's event loop to its step loop."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.errors import EngineFailed, RequestError
from tandem.transfer.decode.pull import Pull
from tandem.wire.messages import Generate


@dataclass(frozen=True, slots=True)
class StartRequest:
    """A request has come from frontend number `frontend`."""

    frontend: int
    generate: Generate


@dataclass(frozen=True, slots=True)
class AbortRequest:
    """Nobody waits for this request any more. Unknown ids are fine."""

    request_id: str


@dataclass(frozen=True, slots=True)
class GrammarReady:
    """The grammar of a request that waits for it is compiled, or cannot be. `since`: time when it came."""

    request_id: str
    since: float
    error: RequestError | None


@dataclass(frozen=True, slots=True)
class KvArrived:
    """All KV of a request is here."""

    pull: Pull


@dataclass(frozen=True, slots=True)
class KvFailed:
    """The KV of a request will not come; reads may still be in progress until `ReadsEnded`.

    `first_token`: the prefill engine has sent it to the client; None where that is not known.
    """

    request_id: str
    reason: str
    first_token: int | None = None


@dataclass(frozen=True, slots=True)
class ReadsEnded:
    """No read into the blocks of a request is in progress any more."""

    request_id: str


@dataclass(frozen=True, slots=True)
class KvCorrupt:
    """A reader got bytes of these requests' KV that do not fit their checksums: our memory may be damaged."""

    request_ids: list[str]


@dataclass(frozen=True, slots=True)
class LeasesEnded:
    """No reader holds the blocks of these requests any more."""

    request_ids: list[str]


@dataclass(frozen=True, slots=True)
class Shutdown:
    """The engine is to end in good order."""

    reason: str


@dataclass(frozen=True, slots=True)
class Drain:
    """Take no new requests, and end in good order once those that are here have ended and their KV has been read.

    `by`: time by which to end in any case.
    """

    by: float


@dataclass(frozen=True, slots=True)
class Fail:
    """The engine cannot go on: end with this error."""

    error: EngineFailed


Command = (
    StartRequest
    | AbortRequest
    | GrammarReady
    | KvArrived
    | KvFailed
    | ReadsEnded
    | KvCorrupt
    | LeasesEnded
    | Shutdown
    | Drain
    | Fail
)
