"""A well-behaved client beside the hostile ones: it asks what it knows the answer to, all the time."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field

from tests.support.families import prompt_of
from tests.support.http import Http

PROMPTS = [prompt_of(length, seed=7) for length in (3, 20, 70)]
MAX_TOKENS = 8
SLOW = 30.0


@dataclass
class Witness:
    """Asks router and engines in turn, from a thread of its own.

    Attributes:
        asked: answers by door.
        complaints: everything that was not right.
        slowest: seconds of the slowest answer.
    """

    doors: dict[str, Http]
    asked: Counter[str] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)
    slowest: float = 0.0
    _known: dict[int, list[int]] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Learn the answers in peace, then ask for them again and again until `stop`."""
        http = self.doors["router"]
        for place, prompt in enumerate(PROMPTS):
            self._known[place] = http.complete(prompt, max_tokens=MAX_TOKENS, ignore_eos=True).token_ids
        self._thread = threading.Thread(target=self._run, name="witness")
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(120)

    def ask(self, name: str, place: int) -> None:
        started = time.monotonic()
        try:
            reply = self.doors[name].complete(PROMPTS[place], max_tokens=MAX_TOKENS, ignore_eos=True)
            health = self.doors[name].get("/health")
        except OSError as error:
            self.complaints.append(f"{name}: {error!r} after {time.monotonic() - started:.1f} s")
            return
        self.slowest = max(self.slowest, time.monotonic() - started)
        self.asked[name] += 1
        if reply.status != 200:
            self.complaints.append(f"{name}: {reply.status} {reply.body[:300]!r}")
        elif reply.token_ids != self._known[place]:
            self.complaints.append(f"{name}: {reply.token_ids} for {self._known[place]}")
        if health.status != 200:
            self.complaints.append(f"{name}: health is {health.status} {health.body[:200]!r}")

    def _run(self) -> None:
        turn = 0
        while not self._stop.wait(0.02):
            turn += 1
            self.ask(list(self.doors)[turn % len(self.doors)], turn % len(PROMPTS))
