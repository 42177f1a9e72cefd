"""How much clients may ask for: a part of `tandem.config`, which explains the form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from tandem.errors import ConfigError
from tandem.flags import LIMITS as GROUP
from tandem.flags import check_counts, check_positive, parse_size, text_flag

MIN_HEAD = 1024


@Parameter(name="*", group=GROUP)
@dataclass(frozen=True, slots=True)
class LimitsSection:
    """A budget for what clients send, spent before anything is made of it."""

    max_body: Annotated[int, text_flag(parse_size, "--max-body")] = 32 * 2**20
    "Bytes of a request's body; more is a 413."
    max_head: Annotated[int, text_flag(parse_size, "--max-head")] = 32 * 2**10
    "Bytes of a request's line and headers; more is a 431."
    max_body_memory: Annotated[int, text_flag(parse_size, "--max-body-memory")] = 256 * 2**20
    "Bytes of the bodies of all open requests together; beyond them a 503."
    max_connections: int = 4096
    "Open connections; beyond them only /health and /metrics are answered, all else is a 503."
    max_client_connections: int = 2048
    "The same for each client address."
    max_requests: int = 2048
    "Open requests; beyond them a 503."
    max_client_requests: int | None = None
    "Open requests of each API key, or without keys each address; beyond them a 429. By default as --max-requests."
    max_choices: int = 1024
    "Choices of a request: prompts times n."
    max_open_choices: int = 8192
    "Choices of all open requests together; beyond them a 503."
    max_messages: int = 4096
    "Messages of a chat."
    head_timeout: float = 15.0
    "Seconds in which a request's line and headers must come."
    body_timeout: float = 120.0
    "Seconds in which a request's body must come."
    write_timeout: float = 30.0
    "Seconds for which a client may read nothing of its answer."

    def __post_init__(self) -> None:
        check_counts(
            max_connections=self.max_connections,
            max_client_connections=self.max_client_connections,
            max_requests=self.max_requests,
            max_choices=self.max_choices,
            max_open_choices=self.max_open_choices,
            max_messages=self.max_messages,
        )
        check_positive(
            max_body=self.max_body,
            max_client_requests=self.max_client_requests,
            head_timeout=self.head_timeout,
            body_timeout=self.body_timeout,
            write_timeout=self.write_timeout,
        )
        if self.max_head < MIN_HEAD:
            raise ConfigError(f"--max-head must be at least {MIN_HEAD} bytes; got {self.max_head}")
        for name, part in (("max_body_memory", "max_body"), ("max_open_choices", "max_choices")):
            if getattr(self, name) < getattr(self, part):
                raise ConfigError(
                    f"--{name.replace('_', '-')} ({getattr(self, name)}) must not be less than"
                    f" --{part.replace('_', '-')} ({getattr(self, part)}): it counts all requests together"
                )


LIMITS = LimitsSection()
