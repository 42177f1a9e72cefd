"""Hostile members: clients that hold the cluster key, if there is one, and send messages over ZeroMQ."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import zmq

from tandem.errors import WireError
from tandem.ids import EngineIdentity
from tandem.kv.layout import block_major
from tandem.kv.shard import shard
from tandem.transfer.handshake import EngineDescriptor, RankDescriptor
from tandem.transfer.thread.thread_messages import FromTransferThread
from tandem.transfer.transports.base import RankEndpoint, Region
from tandem.transfer.transports.tcp.protocol import ADDRESSES, Fetch, ServerAddress
from tandem.wire.codec import Codec
from tandem.wire.keys import new_key
from tandem.wire.messages import Address, Goodbye, Outputs, ToEngine, ToFrontend, Tokens
from tandem.wire.peer_messages import (
    Claim,
    Claimed,
    Envelope,
    Hello,
    KvComputed,
    Refused,
    Release,
    Renew,
    Renewed,
    ToDecode,
    ToPrefill,
    Welcome,
)
from tandem.wire.sockets import SocketOptions, Sockets
from tests.fuzz.channel import Channel
from tests.fuzz.fakes import Defect
from tests.fuzz.live.cluster import FuzzedCluster
from tests.fuzz.live.ports import Port
from tests.support.registrations import make_register

OWN = EngineIdentity("fuzz-p", "fuzz-incarnation")
SOCKETS_PER_PORT = 6
PATIENCE_MS = 20_000
NAMES = [
    "prefill-0",
    "decode-0",
    "fuzz-p",
    "fuzz-incarnation",
    "r0",
    "r1",
    "prefill",
    "decode",
    "mixed",
    "other",
    "life",
]


class Members:
    """Sends mutated messages to every port; and is a prefill engine, which the decode engine comes to.

    Names of the cluster's own engines are left alone where they register: who is let in and takes one takes its place.
    """

    def __init__(self, cluster: FuzzedCluster, rng: random.Random) -> None:
        self._cluster = cluster
        self._rng = rng
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sockets = Sockets(self._context, cluster.key)
        self._strangers = [Sockets(self._context, None)]
        if cluster.key is not None:
            self._strangers.append(Sockets(self._context, new_key()))
        self._open: dict[Port, list[zmq.Socket[bytes]]] = {}
        self._names = 0
        self._door = DecoyEngine(self._sockets, rng)
        self._channels = self._make_channels()
        options = SocketOptions(identity=OWN.incarnation.encode())
        self._registering = [
            self._sockets.connect(zmq.DEALER, port.host, port.number, options) for port in cluster.ports["control"]
        ]

    def _make_channels(self) -> dict[str, list[Channel]]:
        life = str(self._cluster.engines["prefill-0"]["incarnation"])
        names, numbers = [life, *NAMES], range(12)
        register = msgspec.structs.replace(
            make_register(OWN, "prefill", model="other"), peer_address=self._door.address
        )
        self.register = register
        frontend = [register, register.status, Outputs([Tokens("r0", 0, [1])]), Goodbye("no")]
        prefill = [
            Hello(_ENVELOPE, OWN, "prefill-0", life),
            Claim(life, "r0"),
            Renew(life, 0, ["r0"]),
            Release(life, ["r0"]),
        ]
        control, peer = Channel(ToFrontend, frontend, NAMES[2:], numbers), Channel(ToPrefill, prefill, names, numbers)
        others = [
            Channel(kind, (), names, numbers)
            for kind in (ToEngine, ToDecode, FromTransferThread, Fetch, EngineDescriptor)
        ]
        return {"control": [control, control, peer], "peer": [peer, peer, control], "rank": [*others, peer, control]}

    def feed(self, kind: str) -> bytes:
        """Send one message to a port of this kind; return it."""
        rng = self._rng
        data = rng.choice(self._channels[kind]).data(rng)
        # Frames of one message have no bound together in ZeroMQ: these are many, but small.
        frames = [data] if rng.random() < 0.97 or len(data) > 4096 else [data] * rng.choice([2, 40])
        try:
            self._socket(rng.choice(self._cluster.ports[kind])).send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            pass  # it was refused at the door, and its queue is full
        self._cluster.count(f"member {kind}")
        return data

    def decoy(self) -> None:
        """Be a prefill engine for a moment: register with all frontends, and answer decode engines."""
        for registering in self._registering:
            registering.send(msgspec.msgpack.encode(self.register))
        self._cluster.count("decoy", self._door.answer())

    def _socket(self, port: Port) -> zmq.Socket[bytes]:
        sockets = self._open.setdefault(port, [])
        if len(sockets) >= SOCKETS_PER_PORT and self._rng.random() < 0.01:
            sockets.pop(0).close(linger=0)
        if len(sockets) < SOCKETS_PER_PORT:
            self._names += 1
            identity = self._rng.choice([b"fuzz-%d" % (self._names % 8), b"x" * 255, b"9", b"decode-0", None])
            members = self._sockets if self._rng.random() < 0.8 else self._rng.choice(self._strangers)
            options = SocketOptions(identity=identity, hwm=1000)
            sockets.append(members.connect(zmq.DEALER, port.host, port.number, options))
        return self._rng.choice(sockets)

    def check(self) -> None:
        """Every port that answers members must go on answering them. Raises Defect."""
        for port in self._cluster.ports["control"]:
            self._expect(port, self.register.status)
        for port in self._cluster.ports["peer"]:
            self._expect(port, Hello(_ENVELOPE, OWN, "nobody"))

    def _expect(self, port: Port, message: Any) -> None:
        socket = self._sockets.connect(zmq.DEALER, port.host, port.number, SocketOptions(identity=b"fuzz-check"))
        socket.send(msgspec.msgpack.encode(message))
        answered = socket.poll(PATIENCE_MS)
        socket.close(linger=0)
        if not answered:
            raise Defect(f"{port} does not answer any more")

    def close(self) -> None:
        self._context.destroy(linger=0)


class DecoyEngine:
    """A prefill engine that answers decode engines as it likes. `address`: its peer socket."""

    def __init__(self, sockets: Sockets[zmq.Socket[bytes]], rng: random.Random) -> None:
        self._rng = rng
        self._socket, port = sockets.bind(zmq.ROUTER, "127.0.0.1", 0, SocketOptions(handover=True))
        self.address = Address("127.0.0.1", port)
        self._heard: Codec[ToPrefill] = Codec(ToPrefill)
        self._channel = Channel(
            ToDecode, [KvComputed(OWN.incarnation, "r0", 0, [1], 4, True, 7)], NAMES, range(12), valid=0.4
        )
        self._readers: list[bytes] = []

    def _description(self) -> EngineDescriptor:
        """Describe memory as the cluster's engines have it, at a socket that serves none."""
        layout = block_major(
            shard(2, 2, tp=1, pp=1, tp_rank=0, pp_rank=0), blocks=8, block_size=16, head_dim=32, itemsize=4
        )
        metadata = ADDRESSES.encode(ServerAddress(self.address.host, self.address.port))
        endpoint = RankEndpoint(f"fuzz-p/{self._rng.randrange(4)}", metadata, Region(0, layout.nbytes))
        return EngineDescriptor(OWN, 16, [RankDescriptor(0, 0, 0, "node", layout, endpoint)])

    def answer(self) -> int:
        """Answer what has come, honestly and otherwise; return the number of answers."""
        count, rng = 0, self._rng
        while self._socket.poll(0):
            reader, data = self._socket.recv_multipart()
            self._readers = [*[one for one in self._readers if one != reader], reader][-4:]
            try:
                honest = self._honest(self._heard.decode(data))
            except WireError as error:
                raise Defect(f"a decode engine sent what no prefill engine takes: {error}") from None
            for answer in honest:
                self._channel.learn(answer)
                self._socket.send_multipart([reader, msgspec.msgpack.encode(answer)])
        for reader in self._readers:
            for _ in range(rng.randint(1, 4)):
                self._socket.send_multipart([reader, self._channel.data(rng)])
                count += 1
        return count

    def _honest(self, message: ToPrefill) -> list[Any]:
        match message:
            case Hello(envelope=envelope) if self._rng.random() < 0.8:
                ttl = self._rng.choice([3.0, 3.0, 0.0, 1e300])
                return [Welcome(envelope, OWN, ttl, msgspec.Raw(msgspec.msgpack.encode(self._description())))]
            case Hello():
                return [Refused(OWN, "fingerprint", "a", "b")]
            case Claim(to=to, request_id=request, number=number):
                return [Claimed(to, request, number), KvComputed(to, request, 0, [1], 4, True, 7)]
            case Renew(to=to, seq=seq):
                return [Renewed(to, seq, [])]
        return []


_ENVELOPE = Envelope((1, 9), "fingerprint", "float32", "tcp", "fuzz")
