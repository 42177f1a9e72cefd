"""The ZeroMQ sockets of everything inside a cluster: CURVE, bounded, watched by the kernel.

With a cluster key every socket encrypts, and a listener lets in only clients that hold the key. Without one,
sockets bind and connect on loopback alone.
"""

from __future__ import annotations

import errno
import threading
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import zmq
from zmq.utils import z85

from tandem.errors import ConfigError
from tandem.wire.addresses import endpoint, is_loopback, resolve
from tandem.wire.codec import MAX_MESSAGE_BYTES
from tandem.wire.keys import ClusterKey

# No socket sends ZeroMQ's heartbeats: libzmq 4.3.5 ends the process (`!_io_error`) when it is to send one over a
# connection whose peer has hung up while what it sent cannot be taken: its queue is full, or another with its identity
# has taken its place. Anybody who is let in could have that happen. The kernels notice a machine that is gone; that a
# process hangs or is stopped is noticed by what processes say themselves.
IDLE_SECONDS = 2
PROBE_SECONDS = 2
PROBES = 2
GONE_TIMEOUT_MS = 6_000
CONNECT_TIMEOUT_MS = 5_000

# Between the ranks of an engine they are given longer: all other connections are made again when they break, and one of
# these ends the engine.
PATIENT_IDLE_SECONDS = 4
PATIENT_PROBE_SECONDS = 2
PATIENT_PROBES = 3
PATIENT_TIMEOUT_MS = 10_000

_CURVE_OVERHEAD_BYTES = 1_024

S = TypeVar("S", bound="zmq.Socket[Any]")


@dataclass(frozen=True, slots=True)
class SocketOptions:
    """Options in which our sockets differ.

    Attributes:
        max_message: largest frame in bytes that is received; a peer that sends a larger one is disconnected.
        hwm: messages that may wait per peer, in each direction.
        mandatory: a ROUTER raises (EHOSTUNREACH, EAGAIN) where it would silently drop what it cannot send.
        handover: a new connection to a ROUTER with an `identity` already in use replaces the old one.
        identity: under which a ROUTER addresses this socket; chosen by the ROUTER if None.
        reconnect: connect again when the connection breaks.
        patient: a machine that does not answer is given up after 10 s, not 6.
        monitor: `zmq.EVENT_...` that `socket.get_monitor_socket()` is to report, from before the first can happen.
    """

    max_message: int = MAX_MESSAGE_BYTES
    hwm: int = 10_000
    mandatory: bool = False
    handover: bool = False
    identity: bytes | None = None
    reconnect: bool = True
    patient: bool = False
    monitor: int = 0


DEFAULT_OPTIONS = SocketOptions()


class Sockets(Generic[S]):
    """Makes sockets in a ZeroMQ context, which may be a `zmq.Context` or a `zmq.asyncio.Context`.

    It owns neither the context nor the sockets: they are the caller's to close. Several may share a context, also
    with different keys.

    Args:
        context: the sockets' own; decides their class.
        key: the cluster key; None restricts everything to loopback.
    """

    def __init__(self, context: zmq.Context[S], key: ClusterKey | None) -> None:
        self._context = context
        self._key = key
        if key is not None:
            _start_authenticator(context)

    def bind(
        self, kind: zmq.SocketType, host: str, port: int, options: SocketOptions = DEFAULT_OPTIONS
    ) -> tuple[S, int]:
        """Return a listening socket and its port; port 0 takes any that is free.

        Raises:
            ConfigError: not loopback and no key, an unknown host or one of another machine, or a port in use.
        """
        address = self._permitted(host, port, "listen on")
        socket = self._open(kind, ":" in address, options)
        if self._key is not None:
            socket.curve_server = True
            socket.curve_secretkey = self._key.server.secret
            socket.zap_domain = self._key.client.public
            socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)
        try:
            socket.bind(f"tcp://{endpoint(address, port)}")
        except zmq.ZMQError as error:
            socket.close()
            raise ConfigError(_bind_failure(host, port, error)) from None
        last: bytes = socket.get(zmq.LAST_ENDPOINT)  # type: ignore[assignment]
        return socket, int(last.rstrip(b"\0").rpartition(b":")[2])

    def connect(self, kind: zmq.SocketType, host: str, port: int, options: SocketOptions = DEFAULT_OPTIONS) -> S:
        """Return a socket that connects in the background, and again whenever the connection breaks.

        A host name is resolved at each attempt, so a peer may come back at another address.

        Raises:
            ConfigError: not loopback and no key, an unknown host, or no port.
        """
        if not 0 < port < 65536:
            raise ConfigError(f"cannot connect to {endpoint(host, port)}: ports go from 1 to 65535")
        address = self._permitted(host, port, "connect to")
        socket = self._open(kind, ":" in address, options)
        if self._key is not None:
            socket.curve_serverkey = self._key.server.public
            socket.curve_publickey = self._key.client.public
            socket.curve_secretkey = self._key.client.secret
        # Without a key the address that was checked is the one to use; with one, a name stays a name.
        target = address if self._key is None or host in ("", "*") else host.strip("[]")
        try:
            socket.connect(f"tcp://{endpoint(target, port)}")
        except zmq.ZMQError as error:
            socket.close()
            raise ConfigError(f"cannot connect to {endpoint(host, port)}: {error}") from None
        return socket

    def _permitted(self, host: str, port: int, verb: str) -> str:
        """Return the numeric address of `host`, if these sockets may use it."""
        address = str(resolve(host))
        if self._key is None and not is_loopback(address):
            raise ConfigError(
                f"refusing to {verb} {endpoint(host, port)}: without a cluster key only loopback is open. "
                "Make a key with `tandem keygen FILE`; give it to every process with `--cluster-key-file FILE`."
            )
        return address

    def _open(self, kind: zmq.SocketType, ipv6: bool, options: SocketOptions) -> S:
        socket = self._context.socket(kind)
        for option, value in _settings(kind, ipv6, options).items():
            socket.set(option, value)
        if options.monitor:
            socket.get_monitor_socket(options.monitor)
        return socket


def _settings(kind: zmq.SocketType, ipv6: bool, options: SocketOptions) -> dict[int, int | bytes]:
    settings: dict[int, int | bytes] = {
        zmq.LINGER: 0,
        zmq.SNDHWM: options.hwm,
        zmq.RCVHWM: options.hwm,
        zmq.MAXMSGSIZE: options.max_message + _CURVE_OVERHEAD_BYTES,
        zmq.HANDSHAKE_IVL: CONNECT_TIMEOUT_MS,
        zmq.CONNECT_TIMEOUT: CONNECT_TIMEOUT_MS,
        zmq.RECONNECT_IVL: 100 if options.reconnect else -1,
        zmq.RECONNECT_IVL_MAX: 2_000 if options.reconnect else 0,
        **_watching(patient=options.patient),
        zmq.BACKLOG: 1_024,
        zmq.IPV6: int(ipv6),
    }
    if kind == zmq.ROUTER:
        settings[zmq.ROUTER_MANDATORY] = int(options.mandatory)
        settings[zmq.ROUTER_HANDOVER] = int(options.handover)
    if options.identity is not None:
        settings[zmq.IDENTITY] = options.identity
    return settings


def _watching(*, patient: bool) -> dict[int, int | bytes]:
    """Return the options by which the kernel notices a peer whose machine is gone, within 6 s or 10 s."""
    idle, probe, probes, timeout = IDLE_SECONDS, PROBE_SECONDS, PROBES, GONE_TIMEOUT_MS
    if patient:
        idle, probe, probes, timeout = PATIENT_IDLE_SECONDS, PATIENT_PROBE_SECONDS, PATIENT_PROBES, PATIENT_TIMEOUT_MS
    return {
        zmq.TCP_KEEPALIVE: 1,
        zmq.TCP_KEEPALIVE_IDLE: idle,
        zmq.TCP_KEEPALIVE_INTVL: probe,
        zmq.TCP_KEEPALIVE_CNT: probes,
        zmq.TCP_MAXRT: timeout,
    }


def _bind_failure(host: str, port: int, error: zmq.ZMQError) -> str:
    place = endpoint(host, port)
    if error.errno == errno.EADDRINUSE:
        return f"cannot listen on {place}: the port is in use; choose another, or 0 for any that is free"
    if error.errno in (errno.EADDRNOTAVAIL, errno.ENODEV):
        return f"cannot listen on {place}: {host} is not an address of this machine"
    return f"cannot listen on {place}: {error}"


# --- authentication --------------------------------------------------------------------------------------


def _start_authenticator(context: zmq.Context[Any]) -> None:
    """Answer ZAP requests (RFC 27) of this context in a thread of its own; one for each context.

    libzmq lets in any CURVE client as long as nobody answers; ZAP_ENFORCE_DOMAIN makes it let in none.
    """
    # A shadow context: closing all sockets of `context` must not close this one under the thread that uses
    # it. It ends when the context is terminated.
    shadow: zmq.Context[zmq.Socket[bytes]] = zmq.Context.shadow(context.underlying)
    socket = shadow.socket(zmq.REP)
    socket.linger = 0
    try:
        socket.bind("inproc://zeromq.zap.01")
    except zmq.ZMQError as error:
        socket.close()
        if error.errno != errno.EADDRINUSE:
            raise
        return
    threading.Thread(target=_authenticate, args=(socket,), name="tandem-authenticator", daemon=True).start()


def _authenticate(socket: zmq.Socket[bytes]) -> None:
    try:
        while True:
            socket.send_multipart(_zap_reply(socket.recv_multipart()))
    except zmq.ZMQError:
        socket.close()


def _zap_reply(request: list[bytes]) -> list[bytes]:
    """Let in the one client whose public key is the listener's ZAP domain.

    The domain never leaves this process, so each listener names for itself the client that it lets in.
    """
    match request:
        case [b"1.0", request_id, domain, _, _, b"CURVE", key] if len(key) == 32 and z85.encode(key) == domain:
            return [b"1.0", request_id, b"200", b"OK", b"tandem", b""]
    return [b"1.0", *request[1:2], b"400", b"not a member of this cluster", b"", b""]
