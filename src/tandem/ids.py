"""Identities of engines and their incarnations, prompts and requests."""

from __future__ import annotations

import re
import uuid
from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Annotated
from zlib import crc32

import msgspec
from msgspec import Meta

from tandem.errors import ConfigError

_ENGINE_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")


class EngineIdentity(msgspec.Struct, frozen=True, array_like=True):
    """An engine and one incarnation of it.

    Made once, by the leader, and handed to everything else; nothing but `new_identity` makes one.

    Attributes:
        engine_id: names the engine; the same over restarts if it was configured.
        incarnation: new at every start.
    """

    engine_id: Annotated[str, Meta(min_length=1, max_length=256)]
    incarnation: Annotated[str, Meta(min_length=1, max_length=256)]

    def __str__(self) -> str:
        return f"{self.engine_id}/{self.incarnation[:8]}"


def new_identity(engine_id: str | None) -> EngineIdentity:
    """Make the identity of an engine that starts now: its configured id, else a new one."""
    if engine_id is not None and not _ENGINE_ID.fullmatch(engine_id):
        raise ConfigError(
            f"--engine-id must be 1 to 64 letters, digits or '._:-'; got {engine_id!r}."
            " Choose another id or leave it out."
        )
    return EngineIdentity(engine_id or f"engine-{uuid.uuid4().hex[:12]}", uuid.uuid4().hex)


def prompt_digest(token_ids: Sequence[int]) -> str:
    """Return 32 hex digits that tell prompts apart, whatever the block size: BLAKE2b of the ids as int32."""
    return blake2b(array("i", token_ids).tobytes(), digest_size=16).hexdigest()


def output_digest(token_ids: Iterable[int], before: int = 0) -> int:
    """Return 32 bits that tell outputs apart: CRC-32 of the ids as int32, going on from the digest of those `before`.

    Two outputs that differ in one token alone never have the same.
    """
    return crc32(array("i", token_ids).tobytes(), before)


def new_request_id() -> str:
    return uuid.uuid4().hex
