"""What the harness takes from the other tests that start processes; nowhere else is it imported from."""

from __future__ import annotations

from tests.e2e.deployment import clean_environment, flags, run_tandem, tandem_command
from tests.e2e.families import FAMILIES, Reference
from tests.e2e.processes import is_alive, session_of

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
