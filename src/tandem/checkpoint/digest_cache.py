"""Digests of files that were read before, kept in the user's cache directory.

An entry is good for a file of the same path, size, inode and times of change: of its content (which can be set) and of
itself (which cannot). There is one small file an entry, written whole and renamed, so that processes need not wait for
each other; an entry that cannot be read or written costs time and nothing else.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

log = logging.getLogger(__name__)

MAX_ENTRIES = 2048
"""Beyond it the entries that were written first go."""

SETTLED_NS = 2_000_000_000
"""A file that changed less than this before it was read is not remembered: its times may not tell the next change."""


class FileState(msgspec.Struct, frozen=True):
    """What of a file changes when its content does. Times in nanoseconds."""

    path: str
    size: int
    inode: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, file: Path) -> FileState:
        """Look at the file as it is now. Raises OSError."""
        stat = file.stat()
        return cls(str(file.resolve()), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)


class _Entry(msgspec.Struct, frozen=True):
    state: FileState
    digest: str


def default_folder() -> Path | None:
    """Return the user's cache directory for digests; None if this user has none."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # as the XDG base directory specification says of relative paths
        home = os.path.expanduser("~")
        if not os.path.isabs(home):
            return None
        base = os.path.join(home, ".cache")
    return Path(base) / "tandem" / "digests"


class DigestCache:
    """Digests by file, in a folder. It is made when it is first written to; None: nothing is remembered."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def get(self, state: FileState) -> str | None:
        """Return the digest of the file in this state, if it is known."""
        if self._folder is None:
            return None
        try:
            entry = msgspec.json.decode(self._file(state).read_bytes(), type=_Entry)
        except (OSError, msgspec.DecodeError):
            return None
        return entry.digest if entry.state == state else None

    def put(self, state: FileState, digest: str, read_at_ns: int) -> None:
        """Remember a digest, if that can be.

        Args:
            read_at_ns: when reading of the file began, on the clock of its times.
        """
        if self._folder is None or read_at_ns - max(state.mtime_ns, state.ctime_ns) < SETTLED_NS:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._write(self._file(state), msgspec.json.encode(_Entry(state, digest)))
            self._bound()
        except OSError as error:
            log.info("the digest of %s is not remembered: %s", state.path, error)

    @contextlib.contextmanager
    def reading(self, state: FileState) -> Iterator[None]:
        """Keep other processes from reading the same file at the same time, where that can be."""
        with contextlib.ExitStack() as stack:
            try:
                if self._folder is not None:
                    self._folder.mkdir(parents=True, exist_ok=True)
                    lock = stack.enter_context(self._file(state).with_suffix(".lock").open("wb"))
                    fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                log.debug("no lock for %s: %s", state.path, error)
            yield

    def _file(self, state: FileState) -> Path:
        assert self._folder is not None
        return self._folder / f"{hashlib.sha256(state.path.encode(errors='surrogateescape')).hexdigest()}.json"

    def _write(self, file: Path, data: bytes) -> None:
        descriptor, name = tempfile.mkstemp(dir=file.parent, prefix="new-")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
            os.replace(name, file)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise

    def _bound(self) -> None:
        assert self._folder is not None
        entries = list(self._folder.iterdir())
        if len(entries) <= 2 * MAX_ENTRIES:  # each has a lock beside it
            return
        entries.sort(key=lambda entry: entry.stat().st_mtime_ns)
        for entry in entries[: len(entries) - MAX_ENTRIES]:
            entry.unlink(missing_ok=True)
