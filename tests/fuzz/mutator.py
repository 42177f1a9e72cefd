"""Spoils trees and bytes: wrong types, values beyond their ends, huge and deep things, cut and flipped bytes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from tests.fuzz.generator import LEAST_INT, MOST_INT, Tree

NUMBERS = (-1, 0, 1, 127, 128, 255, 256, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, MOST_INT, LEAST_INT)
FLOATS = (math.nan, math.inf, -math.inf, -0.0, -1e-9, 5e-324, 1e-39, 1e39, 1.7976931348623157e308)
TEXTS = (
    "",
    "\0",
    "a\0b",
    "\n" * 8,
    "x" * 257,
    "x" * 4097,
    "..",
    "%s%n",
    "{}",
    "\u202e",
    "🙂" * 65,
    "127.0.0.1",
    "*",
    "::1",
)
LONG_LIST = 2000
DEEP = 600


def hostile(rng: random.Random) -> Tree:
    """Return a value that a field hardly expects."""
    kind = rng.randrange(12)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind < 5:
        return rng.choice(FLOATS)
    if kind < 8:
        return rng.choice(TEXTS)
    if kind == 8:
        return rng.choice([None, True, False, b"", b"\xff" * 9])
    if kind == 9:
        return [rng.choice(NUMBERS)] * rng.choice([0, 1, LONG_LIST])
    return _deep(rng) if kind == 10 and rng.random() < 0.1 else rng.choice([{}, [], {"": None}, [[]], {"type": "x"}])


def _deep(rng: random.Random) -> Tree:
    tree: Tree = 0
    for _ in range(rng.choice([3, 40, DEEP])):
        tree = [tree] if rng.random() < 0.5 else {"a": tree}
    return tree


def mutate(tree: Tree, rng: random.Random) -> Tree:
    """Spoil one place of a tree, and sometimes a few; the tree that was given may change with it."""
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        places = list(_places(tree))
        if not places:
            return hostile(rng)
        parent, key = rng.choice(places)
        rng.choice(_SPOILS)(parent, key, rng)
    return tree


def _places(tree: Tree) -> Iterator[tuple[Any, Any]]:
    """Yield container and key of every value, less those of long lists beyond their first few."""
    waiting = [tree]
    while waiting:
        container = waiting.pop()
        keys: Any = list(container) if isinstance(container, dict) else range(min(len(container), 8))
        for key in keys:
            yield container, key
            if isinstance(container[key], dict | list):
                waiting.append(container[key])


def _replace(parent: Any, key: Any, rng: random.Random) -> None:
    parent[key] = hostile(rng)


def _nudge(parent: Any, key: Any, rng: random.Random) -> None:
    """Replace by something of the same type, at or beyond an end."""
    value = parent[key]
    if isinstance(value, bool) or value is None:
        parent[key] = not value
    elif isinstance(value, int):
        parent[key] = rng.choice([*NUMBERS, max(LEAST_INT, min(MOST_INT, value + rng.choice([-1, 1])))])
    elif isinstance(value, float):
        parent[key] = rng.choice(FLOATS)
    elif isinstance(value, str):
        parent[key] = rng.choice(TEXTS)
    elif isinstance(value, bytes):
        parent[key] = spoil(value, rng)
    elif isinstance(value, list):
        parent[key] = value * rng.choice([0, 2, 1 + LONG_LIST // (1 + len(value))])
    else:
        parent[key] = [list(value)]


def _remove(parent: Any, key: Any, rng: random.Random) -> None:
    del parent[key]


def _add(parent: Any, key: Any, rng: random.Random) -> None:
    if isinstance(parent, dict):
        parent[rng.choice(["unknown", "", "type"])] = hostile(rng)
    else:
        parent.insert(key, hostile(rng))


def _move(parent: Any, key: Any, rng: random.Random) -> None:
    """Put the value of another place here."""
    keys = list(parent) if isinstance(parent, dict) else range(len(parent))
    parent[key] = parent[rng.choice(keys)]


_SPOILS: tuple[Callable[[Any, Any, random.Random], None], ...] = (
    _replace,
    _replace,
    _nudge,
    _nudge,
    _remove,
    _add,
    _move,
)


def spoil(data: bytes, rng: random.Random) -> bytes:
    """Spoil bytes: flip, cut, repeat, insert or overwrite some."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(6):
            case 0 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(changed):
                changed[at] = rng.randrange(256)
            case 2:
                del changed[at:]
            case 3:
                changed[at:at] = rng.randbytes(rng.choice([1, 4, 64]))
            case 4:
                changed[at:at] = changed[:at]
            case _:
                # Heads of MessagePack that promise 2^32 - 1 elements or bytes.
                changed[at:at] = rng.choice([b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"])
    return bytes(changed)


def pack(tree: Tree) -> bytes:
    """Return a tree as MessagePack; a dict with keys that it cannot have becomes a list."""
    try:
        return msgspec.msgpack.encode(tree)
    except (TypeError, OverflowError, RecursionError):
        return b"\xc1"
