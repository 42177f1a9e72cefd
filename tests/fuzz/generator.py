"""Messages made from the types of a channel: most of them valid, with values at the ends of what their fields allow."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import inspect

Tree = Any
"""What MessagePack and JSON carry: dicts, lists, strings, bytes, numbers, booleans, None."""

MOST_INT, LEAST_INT = 2**64 - 1, -(2**63)


class MessageGenerator:
    """Makes trees of one type. Fields are at their ends more often than chance would have it.

    Args:
        kind: a message type or a union of them.
        names: words that mean something to the receiver: request ids, engines, incarnations.
        numbers: likewise: block ids, token ids, numbers of sessions and jobs.
    """

    def __init__(self, kind: Any, names: Sequence[str], numbers: Sequence[int]) -> None:
        self._kind = _type_info(kind)
        self._names = names
        self._numbers = numbers

    def tree(self, rng: random.Random) -> Tree:
        return self._make(self._kind, rng, 0)

    def _make(self, kind: inspect.Type, rng: random.Random, depth: int) -> Tree:
        make = _MAKERS.get(type(kind))
        if make is None:
            return rng.choice([None, 0, "x", [], {}])
        return make(self, kind, rng, depth)

    def _int(self, kind: inspect.IntType, rng: random.Random, depth: int) -> int:
        low = max(LEAST_INT if kind.ge is None else kind.ge, LEAST_INT if kind.gt is None else kind.gt + 1)
        high = min(MOST_INT if kind.le is None else kind.le, MOST_INT if kind.lt is None else kind.lt - 1)
        known = [number for number in self._numbers if low <= number <= high]
        chance = rng.random()
        if known and chance < 0.6:
            return rng.choice(known)
        if chance < 0.9:
            return rng.randint(max(low, -16), min(high, 64)) if low <= 64 and high >= -16 else low
        return rng.choice([low, low + 1, high, high - 1, min(high, 2**31 - 1), min(high, 2**31), min(high, 2**53)])

    def _float(self, kind: inspect.FloatType, rng: random.Random, depth: int) -> float:
        low = next((float(end) for end in (kind.ge, kind.gt) if end is not None), -math.inf)
        high = next((float(end) for end in (kind.le, kind.lt) if end is not None), math.inf)
        if rng.random() < 0.7:
            return rng.uniform(max(low, -10.0), min(high, 10.0))
        ends = [low, high, math.nextafter(low, math.inf), math.nextafter(high, -math.inf), 0.0, -0.0, 5e-324, 1e-39]
        return rng.choice([end for end in ends if low <= end <= high])

    def _str(self, kind: inspect.StrType, rng: random.Random, depth: int) -> str:
        chance = rng.random()
        if self._names and chance < 0.8:
            return rng.choice(self._names)
        low, high = kind.min_length or 0, min(kind.max_length or 4096, 4096)
        if chance < 0.95:
            return rng.choice("aß東🙂\n\0%{}\x1b") * max(low, min(high, rng.randint(0, 8)))
        return "x" * rng.choice([low, high])

    def _bytes(self, kind: inspect.BytesType, rng: random.Random, depth: int) -> bytes:
        low, high = kind.min_length or 0, min(kind.max_length or 64, 64)
        return rng.randbytes(max(low, rng.randint(0, high) // 8 * 8))

    def _list(self, kind: inspect.ListType, rng: random.Random, depth: int) -> list[Tree]:
        low = kind.min_length or 0
        return [self._make(kind.item_type, rng, depth + 1) for _ in range(low + rng.choice([0, 1, 1, 2, 3, 8]))]

    def _tuple(self, kind: inspect.TupleType, rng: random.Random, depth: int) -> list[Tree]:
        return [self._make(item, rng, depth + 1) for item in kind.item_types]

    def _vartuple(self, kind: inspect.VarTupleType, rng: random.Random, depth: int) -> list[Tree]:
        return [self._make(kind.item_type, rng, depth + 1) for _ in range(rng.randint(0, 7))]

    def _dict(self, kind: inspect.DictType, rng: random.Random, depth: int) -> dict[Tree, Tree]:
        key, value = kind.key_type, kind.value_type
        return {self._make(key, rng, depth + 1): self._make(value, rng, depth + 1) for _ in range(rng.randint(0, 3))}

    def _union(self, kind: inspect.UnionType, rng: random.Random, depth: int) -> Tree:
        return self._make(rng.choice(kind.types), rng, depth)

    def _struct(self, kind: inspect.StructType, rng: random.Random, depth: int) -> Tree:
        if kind.array_like:
            values = [self._make(field.type, rng, depth + 1) for field in kind.fields]
            return values if kind.tag is None else [kind.tag, *values]
        tree: dict[str, Tree] = {} if kind.tag is None else {str(kind.tag_field): kind.tag}
        for field in kind.fields:
            if field.required or rng.random() < 0.5:
                tree[field.encode_name] = self._make(field.type, rng, depth + 1)
        return tree


_MAKERS: dict[type, Callable[[MessageGenerator, Any, random.Random, int], Tree]] = {
    inspect.IntType: MessageGenerator._int,
    inspect.FloatType: MessageGenerator._float,
    inspect.StrType: MessageGenerator._str,
    inspect.BytesType: MessageGenerator._bytes,
    inspect.ListType: MessageGenerator._list,
    inspect.TupleType: MessageGenerator._tuple,
    inspect.VarTupleType: MessageGenerator._vartuple,
    inspect.DictType: MessageGenerator._dict,
    inspect.UnionType: MessageGenerator._union,
    inspect.StructType: MessageGenerator._struct,
    inspect.BoolType: lambda self, kind, rng, depth: rng.random() < 0.5,
    inspect.NoneType: lambda self, kind, rng, depth: None,
    inspect.RawType: lambda self, kind, rng, depth: {},
    inspect.EnumType: lambda self, kind, rng, depth: rng.choice([one.value for one in kind.cls]),
}


@functools.cache
def _type_info(kind: Any) -> inspect.Type:
    return inspect.type_info(kind)
