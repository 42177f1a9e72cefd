"""Runs episodes of a target, and says how to replay the one that failed."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

from tests.fuzz.fakes import Clock, Defect, OwnErrors, watched
from tests.fuzz.target import Target


@dataclass(frozen=True)
class Report:
    """What became of a target's inputs. `log_bytes`: all that was logged meanwhile."""

    target: str
    inputs: int
    log_bytes: int


def fuzz(target: type[Target], inputs: int, seed: int, first: int = 0) -> Report:
    """Feed at least this many inputs, in whole episodes.

    Raises:
        Defect: says which input it was, and how to feed it again.
    """
    done = 0
    with watched() as (clock, errors):
        while done < inputs:
            episode = first + done // target.INPUTS
            asyncio.run(_episode(target, seed, episode, clock, errors))
            done += target.INPUTS
        return Report(target.NAME, done, errors.log_bytes)


async def _episode(kind: type[Target], seed: int, episode: int, clock: Clock, errors: OwnErrors) -> None:
    target = kind(random.Random(f"{seed}/{kind.NAME}/{episode}"), clock, errors)
    number, last = -1, None
    try:
        await target.begin()
        for number in range(kind.INPUTS):  # noqa: B007
            await target.feed()
            target.check()
        last = "the end"
        await target.end()
        target.check()
    except BaseException as error:
        where = last or f"input {number}: {_shown(target.last)}"
        again = f"python -m tests.fuzz --target {kind.NAME} --seed {seed} --episode {episode} --inputs 1"
        raise Defect(f"{kind.NAME}, {where}\n{type(error).__name__}: {error}\nto see it again: {again}") from error
    finally:
        await target.close()


def _shown(data: object) -> str:
    text = repr(data)
    return text if len(text) < 4000 else f"{text[:4000]} ... ({len(text)} characters)"
