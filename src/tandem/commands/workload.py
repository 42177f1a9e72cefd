"""The load that `tandem bench` sends: prompts, arrivals, and the SLOs that a request must meet to count as goodput."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter, Token, convert

from tandem.client import DEFAULT_URL
from tandem.errors import ConfigError


def _milliseconds(_: object, tokens: Sequence[Token]) -> float:
    """Return seconds."""
    return float(convert(float, tokens)) / 1e3


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class Slo:
    """Service-level objectives, in seconds; one that is None is met by every request. (DistServe, OSDI 2024.)"""

    ttft: Annotated[float | None, Parameter(name="--ttft-goal", converter=_milliseconds)] = None
    "Milliseconds to the first token; requests that keep the goals count as goodput."
    tpot: Annotated[float | None, Parameter(name="--tpot-goal", converter=_milliseconds)] = None
    "Milliseconds for each token after the first."

    @property
    def is_set(self) -> bool:
        return self.ttft is not None or self.tpot is not None

    def is_met(self, ttft: float, tpot: float) -> bool:
        return (self.ttft is None or ttft <= self.ttft) and (self.tpot is None or tpot <= self.tpot)


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class Workload:
    """The flags of `tandem bench` that describe the load."""

    url: str = DEFAULT_URL
    "Of a router, an engine, or another server with an OpenAI API."
    input_len: int = 512
    "Tokens of each prompt."
    output_len: int = 64
    "Tokens of each answer."
    num_prompts: int = 32
    "How many requests to measure."
    request_rate: float = math.inf
    "Requests a second, arriving as a Poisson process; inf for all at once."
    concurrency: int | None = None
    "Most requests under way at once; by default no limit."
    model: str | None = None
    "What the server calls its model; by default the first that it lists."
    seed: int = 0
    "Of the prompts and arrivals."
    warmup: int = 1
    "Requests sent before the measured ones."
    vocab_size: int = 256
    "Prompts are made of token ids below it; any model has the first 256."
    slo: Slo = Slo()

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len", "num_prompts", "request_rate", "concurrency", "vocab_size"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"--{name.replace('_', '-')} must be greater than 0; got {value}")
        if self.warmup < 0:
            raise ConfigError(f"--warmup must be 0 or more; got {self.warmup}")

    def prompts(self) -> list[list[int]]:
        """Return `warmup + num_prompts` prompts of `input_len` random token ids; the same for the same seed."""
        import numpy as np

        shape = (self.warmup + self.num_prompts, self.input_len)
        drawn: list[list[int]] = np.random.default_rng(self.seed).integers(self.vocab_size, size=shape).tolist()
        return drawn

    def arrivals(self) -> list[float]:
        """Return the seconds from the start for each measured request; the first is 0."""
        import numpy as np

        if math.isinf(self.request_rate):
            return [0.0] * self.num_prompts
        gaps = np.random.default_rng([self.seed, 1]).exponential(1 / self.request_rate, self.num_prompts - 1)
        return [0.0, *np.cumsum(gaps).tolist()]
