"""Questions with exactly one right answer, for the bundled demo model.

Every answer is spelled out from all over its prompt, letter by letter, so a KV cache that was moved wrongly
shows as a wrong answer. A question is pure data: the same `(count, seed, ...)` gives the same questions.

Kinds:

- ``reverse``: ``Reverse: krqzm`` -> ``mzqrk`` (distinct letters)
- ``sort``: ``Sort: qfkz`` -> ``fkqz`` (distinct letters)
- ``walk``: ``Walk from k: a>t, k>a, t>.`` -> ``kat.`` (each entry of the list is used once)
- ``recall``: ``Recall: a=t, k=3, m=a. Give m a`` -> ``ma at``
"""

import hashlib
import random
import string
from collections.abc import Callable
from dataclasses import dataclass

KINDS = ("reverse", "sort", "walk", "recall")
LONG_KINDS = ("walk", "recall")
SAMPLE_SEED = 0

_LETTERS = string.ascii_lowercase
_NAMES = string.ascii_letters + string.digits + "!#$%&()*+-/;<?@[]^_{|}~"
_HELD_OUT_BELOW = 26  # of 256: about one prompt in ten is never trained on


@dataclass(frozen=True, slots=True)
class Question:
    """One question: its `kind`, the user's `prompt`, and the only right `answer` (without end token)."""

    kind: str
    prompt: str
    answer: str


def is_held_out(prompt: str) -> bool:
    """Return whether `prompt` is kept out of training; it depends on the text alone."""
    return hashlib.blake2b(prompt.encode()).digest()[0] < _HELD_OUT_BELOW


def questions(
    count: int, seed: int, *, held_out: bool = True, kinds: tuple[str, ...] = KINDS, max_entries: int = 16
) -> list[Question]:
    """Return `count` questions, the `kinds` in turn; lists in ``walk`` and ``recall`` have 3 to `max_entries` entries.

    All are held out from training, or with ``held_out=False`` none is.
    """
    return _draw(count, seed, held_out, kinds, entries=(3, max_entries))


def long_questions(
    count: int,
    seed: int,
    *,
    held_out: bool = True,
    kinds: tuple[str, ...] = LONG_KINDS,
    min_entries: int = 74,
    max_entries: int = len(_NAMES),
) -> list[Question]:
    """Return `count` questions over long lists; by default prompts have 400 to 500 characters (= tokens)."""
    return _draw(count, seed, held_out, kinds, entries=(min_entries, max_entries))


def sample_questions() -> list[Question]:
    """Return the 32 fixed held-out questions, short and long; the bundled model answers all of them."""
    return questions(24, seed=SAMPLE_SEED) + long_questions(8, seed=SAMPLE_SEED)


def _draw(count: int, seed: int, held_out: bool, kinds: tuple[str, ...], entries: tuple[int, int]) -> list[Question]:
    rng = random.Random(f"{seed}/{held_out}/{entries}")
    drawn: list[Question] = []
    while len(drawn) < count:
        question = _MAKERS[kinds[len(drawn) % len(kinds)]](rng, rng.randint(*entries))
        if is_held_out(question.prompt) == held_out:
            drawn.append(question)
    return drawn


def _reverse(rng: random.Random, entries: int) -> Question:
    letters = "".join(rng.sample(_LETTERS, rng.randint(4, 16)))
    return Question("reverse", f"Reverse: {letters}", letters[::-1])


def _sort(rng: random.Random, entries: int) -> Question:
    letters = "".join(rng.sample(_LETTERS, rng.randint(4, 16)))
    return Question("sort", f"Sort: {letters}", "".join(sorted(letters)))


def _walk(rng: random.Random, entries: int) -> Question:
    path = rng.sample(_NAMES, entries)
    steps = [f"{here}>{there}" for here, there in zip(path, [*path[1:], "."], strict=True)]
    rng.shuffle(steps)
    return Question("walk", f"Walk from {path[0]}: {', '.join(steps)}", "".join(path) + ".")


def _recall(rng: random.Random, entries: int) -> Question:
    value_of = {name: rng.choice(_NAMES.replace(name, "")) for name in rng.sample(_NAMES, entries)}
    asked = rng.sample(list(value_of), min(entries, rng.randint(3, 8)))
    listed = ", ".join(f"{name}={value}" for name, value in value_of.items())
    answer = " ".join(f"{name}{value_of[name]}" for name in asked)
    return Question("recall", f"Recall: {listed}. Give {' '.join(asked)}", answer)


_MAKERS: dict[str, Callable[[random.Random, int], Question]] = {
    "reverse": _reverse,
    "sort": _sort,
    "walk": _walk,
    "recall": _recall,
}
