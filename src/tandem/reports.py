"""Reports of child processes to the command that owns them; and the one thing that it tells a child."""

from __future__ import annotations

import signal
from collections.abc import Callable

import msgspec

from tandem.errors import RankLost
from tandem.wire.engine_status import EngineStatus

DRAIN_SIGNAL = signal.SIGUSR1
"""Sent to a leader that is ready: it ends once it has drained. (SIGTERM ends it at once, in good order.)"""


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    """A rank loads its weights: bytes so far, and in all."""

    loaded: int
    total: int


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Rank 0: the engine can serve."""

    status: EngineStatus


class Following(msgspec.Struct, frozen=True, tag="following"):
    """Every other rank: it takes its batches from rank 0 from now on."""


class ControlPort(msgspec.Struct, frozen=True, tag="control_port"):
    """A router or an engine's API: engines register at this port."""

    port: int


class Health(msgspec.Struct, frozen=True, tag="health"):
    """A router or an engine's API: whether it can serve a request, each time that this or an engine changes.

    `whole`: also as it should, and not by decode engines alone.
    """

    ok: bool
    whole: bool


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    """The process ends in good order, and not because its owner asked for it."""

    reason: str


class Drained(Ended, frozen=True, tag="drained"):
    """Rank 0: the engine ends as somebody wanted it to; it is not to be started anew."""


class ErrorReport(msgspec.Struct, frozen=True, tag="error"):
    """The process ends with an error.

    Attributes:
        text: one sentence for a person.
        is_root_cause: False if the process ends only because another rank was lost, which may have told more.
    """

    text: str
    is_root_cause: bool


Report = Loading | Ready | Following | ControlPort | Health | Ended | Drained | ErrorReport
Reporter = Callable[[Report], None]


def error_report(error: Exception) -> ErrorReport:
    return ErrorReport(str(error), is_root_cause=not isinstance(error, RankLost))
