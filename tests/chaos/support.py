"""What the harness takes from the other tests that start processes; nowhere else is it imported from."""

from __future__ import annotations

from tests.support.deployment import clean_environment, flags, run_tandem, tandem_command
from tests.support.families import FAMILIES
from tests.support.processes import is_alive, session_of
from tests.support.reference import Reference

__all__ = [
    "FAMILIES",
    "Reference",
    "clean_environment",
    "flags",
    "is_alive",
    "run_tandem",
    "session_of",
    "tandem_command",
]
