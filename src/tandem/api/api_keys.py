"""The API keys that clients may bring, one from a flag and any number from a file that may change."""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from pathlib import Path

from tandem.errors import ConfigError

log = logging.getLogger(__name__)

CHECK_S = 1.0


class ApiKeys:
    """Compares in constant time, and keeps keys only as their digests.

    Args:
        key: from a flag or the environment.
        file: one key a line; empty lines and what follows a # at the begin of a line or after a space are left out. It
            is read again, at most once a second, when it has changed; if it cannot be read then, the keys stay.

    Raises ConfigError for a file that cannot be read or has no key.
    """

    def __init__(self, key: str | None = None, file: Path | None = None) -> None:
        self._own = [_digest(key.encode())] if key is not None else []
        self._file = file
        self._state = _state(file)
        self._from_file = _read(file) if file is not None else []
        self._checked = time.monotonic()

    def client(self, key: bytes) -> str | None:
        """Return a name for the client that brings this key, which does not tell the key; None for a wrong key."""
        self._reload()
        given = _digest(key)
        found = [known for known in (*self._own, *self._from_file) if hmac.compare_digest(known, given)]
        return f"key {found[0].hex()[:16]}" if found else None

    def _reload(self) -> None:
        now = time.monotonic()
        if self._file is None or now - self._checked < CHECK_S:
            return
        self._checked = now
        state = _state(self._file)
        if state == self._state:
            return
        self._state = state
        try:
            self._from_file = _read(self._file)
            log.info("%s has changed: %d API keys", self._file, len(self._from_file))
        except ConfigError as error:
            log.error("%s; the keys that were in it before still count", error)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _state(file: Path | None) -> tuple[int, ...] | None:
    try:
        found = file.stat() if file is not None else None
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_size, found.st_ino) if found else None


def _read(file: Path) -> list[bytes]:
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"--api-key-file {file} cannot be read: {error.strerror}") from None
    keys = [key for line in lines if (key := (b" " + line).split(b" #", 1)[0].strip())]
    if not keys:
        raise ConfigError(f"--api-key-file {file} has no key; put one on each line")
    return [_digest(key) for key in keys]
