"""The cluster key: one secret that every process of a cluster holds, and the CURVE keys made from it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import secrets
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.utils import z85

from tandem.errors import ConfigError

_HEADER = "tandem-cluster-key-v1"
_KEY_BYTES = 32
ENVIRONMENT = "TANDEM_CLUSTER_KEY"
NO_KEY = (
    "without a cluster key every user of this machine can register engines and send messages to them; to keep strangers"
    " out, make a key with `tandem keygen FILE` and give it to every process with --cluster-key-file FILE"
)
"""For a person who starts engines or a router without a key."""
_MAX_FILE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """One side's CURVE key pair in Z85, as ZeroMQ takes it (RFC 26/CURVEZMQ, RFC 32/Z85)."""

    public: bytes
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ClusterKey:
    """32 secret bytes. A process that holds them belongs to the cluster; no other gets a byte in or out."""

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != _KEY_BYTES:
            raise ConfigError(f"a cluster key has {_KEY_BYTES} bytes, this one has {len(self.secret)}")

    @property
    def text(self) -> str:
        """The line in a key file."""
        return f"{_HEADER} {base64.urlsafe_b64encode(self.secret).decode()}"

    @property
    def server(self) -> CurveKeys:
        """Keys of every socket that listens."""
        return self._derive(b"server")

    @property
    def client(self) -> CurveKeys:
        """Keys of every socket that connects; the only ones that a listener lets in."""
        return self._derive(b"client")

    @property
    def fingerprint(self) -> str:
        """8 hex digits that tell keys apart and reveal nothing about them."""
        return hashlib.blake2b(b"fingerprint", digest_size=4, key=self.secret, person=b"tandem-curve-v1").hexdigest()

    def _derive(self, use: bytes) -> CurveKeys:
        digest = hashlib.blake2b(use, digest_size=32, key=self.secret, person=b"tandem-curve-v1")
        secret = z85.encode(digest.digest())
        return CurveKeys(zmq.curve_public(secret), secret)


def new_key() -> ClusterKey:
    return ClusterKey(secrets.token_bytes(_KEY_BYTES))


def parse_key(text: str, source: str) -> ClusterKey:
    """Return the key in a line of text.

    Args:
        text: from `ClusterKey.text`.
        source: the text's origin, for the error.

    Raises:
        ConfigError: `text` is no cluster key. The error does not repeat the text.
    """
    secret = b""
    match text.split():
        case [header, encoded] if header == _HEADER:
            with suppress(binascii.Error, UnicodeEncodeError):
                secret = base64.b64decode(encoded.encode(), altchars=b"-_", validate=True)
    if len(secret) != _KEY_BYTES:
        raise ConfigError(f"{source} does not hold a cluster key; make one with `tandem keygen FILE`")
    return ClusterKey(secret)


def new_key_file(path: Path) -> ClusterKey:
    """Make a key and write it to a new file that only its owner may read.

    Raises:
        ConfigError: the file exists (it is not changed) or cannot be written.
    """
    key = new_key()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigError(f"{path} exists and is not overwritten; choose another file or remove it") from None
    except OSError as error:
        raise ConfigError(f"cluster key file {path} cannot be written: {error.strerror}") from None
    with os.fdopen(descriptor, "w") as file:
        file.write(key.text + "\n")
    return key


def load_key(path: Path | None) -> ClusterKey | None:
    """Return the key in a file; without a file, that in the environment (TANDEM_CLUSTER_KEY), or None.

    Raises:
        ConfigError: the file cannot be read, holds no key, or is open to every user of the machine. (Its
            group may read it: that is how Kubernetes mounts secrets for processes that are not root.)
    """
    if path is None:
        text = os.environ.get(ENVIRONMENT)
        return parse_key(text, f"environment variable {ENVIRONMENT}") if text else None
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cluster key file {path} cannot be read: {error.strerror}") from None
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        raise ConfigError(f"cluster key file {path} is open to every user of this machine; run `chmod 600 {path}`")
    return parse_key(content[:_MAX_FILE_BYTES].decode(errors="replace"), f"cluster key file {path}")
