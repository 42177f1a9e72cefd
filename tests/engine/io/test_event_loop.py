"""The leader's event loop, without a thread: what it makes of the requests that frontends bring."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import zmq

from tandem.config import EngineConfig
from tandem.engine.io.event_loop import LeaderEventLoop
from tandem.engine.io.leader_sockets import LeaderSockets
from tandem.engine.mailbox import Mailbox
from tandem.engine.step_commands import AbortRequest, Command, Drain, StartRequest
from tandem.ids import EngineIdentity
from tandem.transfer.decode.dialer import PeerDialer
from tandem.transfer.prefill.listener import PeerListener
from tandem.wire.control_messages import ChangeRole, DrainEngine
from tandem.wire.messages import Address, Generate, Introduce, Local, PeerAddress, Prefill, PullKv
from tandem.wire.sampling import SamplingParams
from tests.support.registrations import make_register
from tests.transfer.engines import ENVELOPE, descriptor

WHO = EngineIdentity("e0", "life")
PULL = PullKv("p0", "life", Address("127.0.0.1", 9), "remote")


class Rig:
    def __init__(self) -> None:
        self.mailbox: Mailbox[Command] = Mailbox()
        step: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        sockets = LeaderSockets.bind("127.0.0.1", step, None)
        self._contexts = [step, sockets.peer.context]
        register = make_register(WHO, "mixed")
        self.loop = LeaderEventLoop(
            EngineConfig(), descriptor(WHO), ENVELOPE, register, sockets, [], self.mailbox, lambda _: None
        )

    def begin(self, kv: Local | Prefill | PullKv) -> None:
        self.loop._begin(0, Generate("r", [1, 2], 2, SamplingParams(), 60.0, kv))

    @property
    def knows(self) -> bool:
        return self.loop._listener.knows("r") or self.loop._dialer.knows("r")

    def close(self) -> None:
        for context in self._contexts:
            context.destroy(linger=0)
        self.mailbox.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


@pytest.mark.parametrize(
    ("kv", "where", "method"),
    [(Prefill(), PeerListener, "begin"), (PULL, PeerDialer, "open")],
    ids=["prefill", "pull"],
)
def test_a_request_that_cannot_begin_leaves_nothing(
    kv: Prefill | PullKv, where: type, method: str, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patched:
        patched.setattr(where, method, bug)
        with pytest.raises(RuntimeError, match="a bug"):
            rig.begin(kv)
    assert not rig.knows
    kinds = [type(command) for command in rig.mailbox.take()]
    assert AbortRequest in kinds, "what the step loop may have begun ends too"
    assert StartRequest not in kinds[kinds.index(AbortRequest) :]
    rig.begin(Local())
    assert [type(command) for command in rig.mailbox.take()] == [StartRequest]


def test_an_abort_lets_go_of_kv_that_nobody_has_claimed(rig: Rig) -> None:
    """The prefill is done, and so the step loop does not know the request any more."""
    rig.begin(Prefill())
    rig.loop._listener.chunk("r", 0, [1], 2, True, 7)
    rig.loop._abort("r")
    assert not rig.knows
    assert [type(command).__name__ for command in rig.mailbox.take()] == ["StartRequest", "AbortRequest", "LeasesEnded"]


def test_an_abort_that_the_end_of_the_prefill_crosses_lets_go_of_its_kv_too(rig: Rig) -> None:
    rig.begin(Prefill())
    rig.loop._abort("r")
    rig.loop._listener.chunk("r", 0, [1], 2, True, 7)  # the step loop had said so before it heard of the abort
    assert not rig.knows
    assert [type(command).__name__ for command in rig.mailbox.take()] == ["StartRequest", "AbortRequest", "LeasesEnded"]


def test_the_status_tells_how_long_the_running_step_has_run(rig: Rig) -> None:
    assert rig.loop._current_registration().status.step_seconds == 0.0
    rig.loop.clock.since = 0.0  # long ago
    assert rig.loop._current_registration().status.step_seconds > 0.0


def test_what_it_is_told_is_in_its_next_heartbeat(rig: Rig) -> None:
    rig.loop._control(ChangeRole("prefill"))
    assert rig.loop._current_registration().status.role == "prefill"
    assert not rig.loop._current_registration().status.draining
    rig.loop._control(DrainEngine())
    assert rig.loop._current_registration().status.draining
    assert [type(command) for command in rig.mailbox.take()] == [Drain]


def test_a_router_that_knows_nobody_yet_ends_no_session_that_another_one_needs(rig: Rig) -> None:
    peer = PeerAddress(EngineIdentity("p0", "life"), Address("127.0.0.1", 9))

    async def play() -> list[list[str]]:
        known = []
        for frontend, peers in ((0, [peer]), (1, []), (0, [])):
            rig.loop._introduce(frontend, Introduce(peers))
            known.append([one.engine_id for one in rig.loop._dialer.peers])
        rig.loop._dialer.close()
        return known

    assert asyncio.run(play()) == [["p0"], ["p0"], []]
