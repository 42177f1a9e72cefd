"""What an engine tells a frontend of itself, for tests that need no engine."""

from __future__ import annotations

from typing import Any

import msgspec

from tandem.ids import EngineIdentity
from tandem.wire.engine_status import EngineStatus, KvUsage, RequestCounts
from tandem.wire.messages import Address, Register

VOCABULARY = 1000
STEP_TIMEOUT = 20.0


def make_status(identity: EngineIdentity, role: str, **changes: Any) -> EngineStatus:
    status = EngineStatus(
        engine_id=identity.engine_id,
        incarnation=identity.incarnation,
        role=role,
        model="tiny",
        fingerprint="f",
        tp=1,
        pp=1,
        nnodes=1,
        connector="tcp",
        ranks=[],
        kv=KvUsage(block_size=16, blocks=10, free=4, cached=3, leased=2, in_use=1),
        requests=RequestCounts(),
        peers=[],
    )
    return msgspec.structs.replace(status, **changes)


def make_register(identity: EngineIdentity, role: str, **changes: Any) -> Register:
    """`changes`: of the status."""
    return Register(
        identity=identity,
        status=make_status(identity, role, **changes),
        peer_address=Address("127.0.0.1", 20001),
        max_model_len=100,
        max_waiting=10,
        model_path="/model",
        dtype="float32",
        version="0",
        protocol=(1, 1),
        vocab_size=VOCABULARY,
        step_timeout=STEP_TIMEOUT,
        drain_timeout=30.0,
    )
