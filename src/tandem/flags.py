"""Flags: their groups in the help, how their text is read, and checks that name the flag that is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, get_args

from cyclopts import Group, Parameter, Token

from tandem.errors import ConfigError
from tandem.wire.messages import Address

ENGINES = Group("Engines", sort_key=1)
MODEL = Group("Model and memory", sort_key=2)
NETWORK = Group("Network and security", sort_key=3)
RUNNING = Group("Running", sort_key=4)
MAX_MODEL_NAMES = 32
MAX_MODEL_NAME = 256
LIMITS = Group("Limits of the HTTP API", sort_key=5)


def parse_size(text: str, flag: str) -> int:
    """Return the bytes that `1GiB`, `512MiB`, `2GB` or `1048576` mean. Raises ConfigError that names `flag`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if match is None or (match[3] and not match[2]):
        raise ConfigError(f"{flag} must be a size such as 1GiB, 512MiB or 2GB; got {text!r}")
    power = " kmgt".index(match[2] or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def parse_address(text: str, flag: str) -> Address:
    """Read `HOST:PORT` (an IPv6 host in brackets). Raises ConfigError that names `flag`."""
    host, colon, port = text.rpartition(":")
    host = host.strip("[]")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"{flag} must be HOST:PORT with a port from 1 to 65535; got {text!r}")
    return Address(host, int(port))


def text_flag(parse: Callable[[str, str], object], flag: str) -> Parameter:
    """Have the text of a flag read by `parse`, whose errors name the flag wherever the text came from."""

    def convert(_: object, tokens: Sequence[Token]) -> Any:
        return parse(tokens[0].value, flag)

    return Parameter(converter=convert, n_tokens=1, accepts_keys=False, metavar="STR")


def texts_flag(parse: Callable[[str, str], object], flag: str) -> Parameter:
    """As `text_flag`, for a flag that may be given several times; its values may also be parted by commas."""

    def convert(_: object, tokens: Sequence[Token]) -> Any:
        parts = [part.strip() for token in tokens for part in token.value.split(",")]
        return tuple(dict.fromkeys(parse(part, flag) for part in parts))

    # An IPv6 address in brackets is no list in JSON.
    return Parameter(
        converter=convert, accepts_keys=False, json_list=False, negative=(), metavar="STR", show_default=False
    )


def check_port(port: int) -> None:
    if not 0 <= port < 65536:
        raise ConfigError(f"a port is from 0 (any) to 65535; got {port}")


def check_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and value <= 0:
            raise ConfigError(f"{_flag(name)} must be greater than 0; got {value}")


def check_counts(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ConfigError(f"{_flag(name)} must be at least 1; got {value}")


def check_model_names(names: tuple[str, ...]) -> None:
    if len(names) > MAX_MODEL_NAMES:
        raise ConfigError(f"--served-model-name takes up to {MAX_MODEL_NAMES} names; got {len(names)}")
    for name in names:
        if not 0 < len(name) <= MAX_MODEL_NAME:
            raise ConfigError(f"--served-model-name has 1 to {MAX_MODEL_NAME} characters; got {len(name)}")


def check_choice(name: str, value: str, choices: object) -> None:
    """`choices` is a Literal; the command line has checked it already, Python callers have not."""
    if value not in get_args(choices):
        raise ConfigError(f"{_flag(name)} must be one of {', '.join(get_args(choices))}; got {value!r}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
