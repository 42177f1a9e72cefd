"""Virtual time: one queue of events, and processes that each run asyncio on a clock of their own.

Nothing here waits. `World.run` takes the earliest event, sets the time to it and runs it; what that schedules goes into
the same queue. With one seed everything happens in the same order again.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Coroutine
from heapq import heappop, heappush
from typing import Any, cast

import msgspec

Action = Callable[[], object]

MAX_EVENTS = 400_000
"""A schedule that needs more does not come to rest."""


LATE_TIMERS_SECONDS = 0.05
"""After a pause; with that, what other threads still have to do comes first."""

BEATS = {"status", "registered", "thread_alive", "introduce", "renew", "renewed"}


class Handle:
    """A callback that is due at some time."""

    __slots__ = ("_args", "_callback")

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        self._callback: Callable[..., object] | None = callback
        self._args = args

    def __call__(self) -> None:
        if self._callback is not None:
            self._callback(*self._args)

    def cancel(self) -> None:
        self._callback = None


class Loop:
    """The event loop of whichever process runs: what tasks, futures and timeouts use of one.

    One object serves all processes, since each is run until nothing of it is ready.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.ready: deque[Handle] = deque()
        self.itself = cast(asyncio.AbstractEventLoop, self)

    def time(self) -> float:
        return self._world.monotonic()

    def call_soon(self, callback: Callable[..., object], *args: Any, context: object = None) -> Handle:
        if self._world.current is None:
            raise RuntimeError("only processes have event loops")
        handle = Handle(callback, args)
        self.ready.append(handle)
        return handle

    def call_at(self, when: float, callback: Callable[..., object], *args: Any, context: object = None) -> Handle:
        handle, process = Handle(callback, args), self._world.current
        if process is None:
            raise RuntimeError("only processes have event loops")
        self._world.at(process.true_time(when), handle, process)
        return handle

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any, context: object = None) -> Handle:
        return self.call_at(self.time() + delay, callback, *args)

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self.itself)

    def create_task(
        self, coro: Coroutine[Any, Any, Any], *, name: str | None = None, context: object = None
    ) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self.itself, name=name or "task")
        if self._world.current is not None:
            self._world.current.tasks.append(task)
        return task

    def get_debug(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if self._world.current is None or not self._world.current.dead:
            self._world.fail(f"{context.get('message')}: {context.get('exception')!r}")


class World:
    """Time, chance, the queue of events, and what was found wrong.

    Args:
        seed: of everything that is left to chance while it runs.
        verbose: keep a trace.

    Attributes:
        now: true time in seconds, which no process knows.
        current: the process whose code runs.
        failures: what must not happen and did.
    """

    def __init__(self, seed: int, *, verbose: bool = False) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.events = 0
        self.current: Process | None = None
        self.failures: list[str] = []
        self.verbose = verbose
        self.lines: list[str] = []
        self._queue: list[tuple[float, int, Process | None, Action]] = []
        self._number = 0
        self.loop = Loop(self)

    def at(self, when: float, action: Action, process: Process | None = None) -> None:
        """Run `action` at that time: in the process, once it is not paused, or for the world itself."""
        self._number += 1
        heappush(self._queue, (when if when > self.now else self.now, self._number, process, action))

    def after(self, seconds: float, action: Action, process: Process | None = None) -> None:
        self.at(self.now + seconds, action, process)

    def run(self, until: float) -> None:
        """Let time pass."""
        queue = self._queue
        while queue and queue[0][0] <= until:
            self.now, _, process, action = heappop(queue)
            self.events += 1
            if process is None:
                action()
            else:
                process.run(action)
            if self.failures:
                return
        if self.events > MAX_EVENTS:
            self.fail(f"{self.events} events and no end")
        self.now = until

    def fail(self, what: str) -> None:
        """Note that something must not have happened; the schedule ends."""
        self.note(f"VIOLATION {what}")
        self.failures.append(f"at {self.now:.4f} s: {what}")

    def note(self, text: str) -> None:
        """Add a line to the trace; callers that must be quick ask `verbose` first."""
        if self.verbose:
            name = self.current.name if self.current else "-"
            self.lines.append(f"{self.now:9.4f} {name:12} {text}")

    def note_message(self, sender: str, data: bytes) -> None:
        """Add a message that arrived, but for those that come all the time."""
        message: dict[str, Any] = msgspec.msgpack.decode(data)
        kind = message.pop("type")
        if kind not in BEATS:
            self.note(f"{sender} says {kind} {str(message)[:300]}")

    def monotonic(self) -> float:
        """Return what `time.monotonic` returns to the code that runs now."""
        if self.current is None:
            raise RuntimeError("only processes have clocks")
        return self.current.time()

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def wait(self, least: float, most: float) -> float:
        """Return a time between the two, the short ones as likely as the long ones."""
        share: float = (most / least) ** self.random.random()
        return least * share


class Process:
    """An operating system's process, or all processes of an engine, that can be killed and paused.

    Args:
        rate: seconds of its clock in a second of true time.
        offset: its clock at time 0.

    Attributes:
        paused_seconds: of true time, so far.
        tasks: those that it has begun.
        sent: what sending returns: it is done at once.
    """

    def __init__(self, world: World, name: str, rate: float = 1.0, offset: float = 0.0) -> None:
        self.world = world
        self.name = name
        self.dead = False
        self.paused = False
        self.pauses = 0
        self.paused_seconds = 0.0
        self._paused_at = 0.0
        self._rate = rate
        self._offset = offset
        self._backlog: list[Action] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.sent: asyncio.Future[None] = world.loop.create_future()
        self.sent.set_result(None)

    def time(self) -> float:
        return self._offset + self._rate * self.world.now

    def true_time(self, time: float) -> float:
        return (time - self._offset) / self._rate

    def run(self, action: Action) -> None:
        """Run an action and all that is then ready; later, if the process is paused."""
        if self.dead:
            return
        if self.paused:
            self._backlog.append(action)
            return
        world, ready = self.world, self.world.loop.ready
        world.current = self
        action()
        while ready:
            ready.popleft()()
        world.current = None

    def post(self, action: Action) -> None:
        """Run an action in the process as soon as possible."""
        self.world.at(self.world.now, action, self)

    def pause(self) -> None:
        self.paused = True
        self.pauses += 1
        self._paused_at = self.world.now

    def resume(self) -> None:
        """Go on: everything that was due meanwhile happens now; timers in some pauses after all that has come."""
        if self.dead or not self.paused:
            return
        self.paused = False
        self.paused_seconds += self.world.now - self._paused_at
        backlog, self._backlog = self._backlog, []
        late = self.world.random.random() * LATE_TIMERS_SECONDS if self.world.chance(0.5) else 0.0
        for action in backlog:
            self.world.after(late if isinstance(action, Handle) else 0.0, action, self)

    def kill(self) -> None:
        """End at once, wherever it is. Its tasks are cancelled only to free their memory: nothing gets out any more."""
        self.dead = True
        self._backlog.clear()
        self.world.current, ready = self, self.world.loop.ready
        for task in self.tasks:
            task.cancel()
        while ready:
            ready.popleft()()
        self.world.current = None
        self.tasks.clear()
