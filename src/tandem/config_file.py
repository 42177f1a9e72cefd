"""Reads a TOML file of flags: a table for each command, with flags as keys."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence

from tandem.errors import ConfigError

EXPECTED = "a TOML file with a table per command was expected"


def take_config(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[list[str], str | None]:
    """Return the arguments without `--config FILE`, and the file, which TANDEM_CONFIG names too.

    Flags go before the environment, and the environment before the file. Raises ConfigError if there is no such file.
    """
    rest, file = list(arguments), environment.get("TANDEM_CONFIG")
    for index, argument in enumerate(rest):
        if argument == "--config":
            if index + 1 == len(rest):
                raise ConfigError(f"--config needs a file after it; {EXPECTED}")
            file = rest[index + 1]
            del rest[index : index + 2]
            break
        if argument.startswith("--config="):
            file = argument.partition("=")[2]
            del rest[index]
            break
    if file is not None and not os.path.isfile(file):
        raise ConfigError(f"--config {file} is not a file; {EXPECTED}")
    return rest, file


def check_tables(file: str, commands: Sequence[str]) -> None:
    """Raise ConfigError for a table or key that no command would read."""
    try:
        with open(file, "rb") as stream:
            content = tomllib.load(stream)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--config {file}: {error}; {EXPECTED}") from None
    for key, value in content.items():
        if key not in commands or not isinstance(value, dict):
            raise ConfigError(
                f"--config {file}: {key!r} is no table of a command ({', '.join(commands)});"
                " put each flag into the table of its command, such as [serve]"
            )
