"""Messages by which a router runs an engine, rather than has it answer requests; a part of `ToEngine`."""

from __future__ import annotations

from typing import Literal

import msgspec

Role = Literal["prefill", "decode", "mixed"]


class DrainEngine(msgspec.Struct, frozen=True, tag="drain_engine"):
    """Take no new requests, and end once those that are here have ended; the heartbeat then says `draining`."""


class ChangeRole(msgspec.Struct, frozen=True, tag="change_role"):
    """Be used for this from now on; the heartbeat then says so. Requests that are here end here, whatever the role."""

    role: Role


EngineControl = DrainEngine | ChangeRole
