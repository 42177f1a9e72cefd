"""Inputs for one channel: valid, mutated, spoilt, replayed and out of order."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec

from tests.fuzz.generator import MessageGenerator, Tree
from tests.fuzz.mutator import mutate, pack, spoil

REMEMBERED = 64
MOST_BYTES = 1 << 20


class Channel:
    """Makes bytes for the receiver of `kind`.

    Args:
        kind: the message type that is received, or a union of them.
        real: real messages of this channel, whose mutants get further into the receiver than random ones.
        valid: share of the inputs that nothing was done to.
    """

    def __init__(
        self,
        kind: Any,
        real: Sequence[Any] = (),
        names: Sequence[str] = (),
        numbers: Sequence[int] = (),
        valid: float = 0.3,
    ) -> None:
        self._generator = MessageGenerator(kind, names, numbers)
        self._real = [msgspec.msgpack.encode(message) for message in real]
        self._valid = valid
        self._sent: deque[bytes] = deque(maxlen=REMEMBERED)

    def learn(self, message: Any) -> None:
        """Take a real message, to mutate it from now on."""
        self._real.append(msgspec.msgpack.encode(message))
        del self._real[:-REMEMBERED]

    def data(self, rng: random.Random) -> bytes:
        chance = rng.random()
        if self._sent and chance < 0.1:
            return rng.choice(self._sent)  # a replay
        if self._real and rng.random() < 0.5:
            data = rng.choice(self._real)
            if chance > self._valid + 0.1:
                data = pack(mutate(msgspec.msgpack.decode(data), rng))
        else:
            tree: Tree = self._generator.tree(rng)
            data = pack(mutate(tree, rng) if chance > self._valid + 0.1 else tree)
        if chance > 0.85:
            data = spoil(data, rng)
        data = data[:MOST_BYTES]
        self._sent.append(data)
        return data
