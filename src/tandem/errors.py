"""Every error that Tandem raises on purpose.

TandemError
├── ConfigError          a flag, environment variable, file or combination of them that cannot work
├── ModelError           a model folder that cannot be served
├── StartError           ranks that do not come together, or disagree, when an engine starts
├── EngineStopped        an engine ended in good order: it has drained, or was stopped on another node
├── WireError            a message that its channel does not carry
├── TransferError        KV that could not be moved
│   ├── PeerRefused      the two engines cannot share KV: says which field and both values
│   └── PeerLost         the other engine, or one incarnation of it, is gone
└── RequestError         a request that ends without an answer; has an HTTP status (500)
    ├── InvalidRequest   400: the client's mistake
    │   └── NoTokenLeft  400: the request's own parameters rule out every token
    ├── Overloaded       503: try again later
    ├── Draining         503: this engine is about to end and takes no new requests; others do
    ├── Unavailable      503: no engine can take it, and why
    ├── EngineFailed     500: an engine was lost or broke while it worked on the request
    │   ├── EngineLost   it is gone, silent or hangs; it may be heard again
    │   ├── EngineLeft   it was stopped in good order
    │   ├── Diverged     two engines made different texts of one request
    │   └── RankLost     a rank of this engine is gone; what ended it is for that rank to tell
    ├── KvLost           500: the prompt's KV was lost on the way, and the policy is to fail
    ├── KvRetry          503: the same, and the policy is to try another prefill engine
    └── TimedOut         504: the request did not end in time

`tandem.api.http_errors` has the branches of RequestError that only HTTP knows.
"""

from __future__ import annotations


class TandemError(Exception):
    """Base of all; its text is one readable sentence for a person."""


class ConfigError(TandemError):
    """The configuration cannot work."""


class ModelError(TandemError):
    """The model folder cannot be served."""


class StartError(TandemError):
    """The ranks of an engine did not come together or disagree."""


class EngineStopped(TandemError):
    """An engine ended in good order, though not by its owner: it has drained, or was stopped on another node."""


class WireError(TandemError):
    """A message is not of its channel."""


class TransferError(TandemError):
    """KV could not be moved."""


class PeerRefused(TransferError):
    """Two engines cannot share KV.

    Args:
        field: the one that differs, for example `fingerprint`.
        ours: this engine's value.
        theirs: the peer's value.
    """

    def __init__(self, field: str, ours: str, theirs: str) -> None:
        super().__init__(f"{field} differs: ours is {ours}, theirs is {theirs}")
        self.field = field
        self.ours = ours
        self.theirs = theirs


class PeerLost(TransferError):
    """The other engine, or one incarnation of it, is gone."""


class RequestError(TandemError):
    """A request ends without an answer.

    Attributes:
        status: the HTTP status.
        code: a short machine-readable word; also how the error is named on the wire.
        param: the field of the request that is at fault, if one is.
        retry_after: seconds after which the client may try again, if it may.
        engine: incarnation of the engine that reported it, if one did.
    """

    status = 500
    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.retry_after = retry_after
        self.engine: str | None = None


class InvalidRequest(RequestError):
    status = 400
    code = "invalid_request"


class NoTokenLeft(InvalidRequest):
    code = "no_token_left"


class Overloaded(RequestError):
    status = 503
    code = "overloaded"


class Draining(RequestError):
    status = 503
    code = "draining"


class Unavailable(RequestError):
    status = 503
    code = "unavailable"


class EngineFailed(RequestError):
    status = 500
    code = "engine_failed"


class EngineLost(EngineFailed):
    pass


class EngineLeft(EngineFailed):
    pass


class Diverged(EngineFailed):
    pass


class RankLost(EngineFailed):
    pass


class KvLost(RequestError):
    status = 500
    code = "kv_lost"


class KvRetry(RequestError):
    status = 503
    code = "kv_retry"


class TimedOut(RequestError):
    status = 504
    code = "timed_out"


_KINDS = (
    RequestError,
    InvalidRequest,
    NoTokenLeft,
    Overloaded,
    Draining,
    Unavailable,
    EngineFailed,
    KvLost,
    KvRetry,
    TimedOut,
)
REQUEST_ERRORS: dict[str, type[RequestError]] = {kind.code: kind for kind in _KINDS}


def request_error(code: str, message: str, param: str | None = None, retry_after: int | None = None) -> RequestError:
    """Return the exception for an error that came over the wire; an unknown code becomes a plain RequestError."""
    return REQUEST_ERRORS.get(code, RequestError)(message, param=param, retry_after=retry_after)
