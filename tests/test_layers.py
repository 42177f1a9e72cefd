"""Imports point down: to packages of a lower row, and to siblings only where it says so."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import tandem

ROOT = Path(tandem.__file__).parent

# Top to bottom. A package may import those of all rows below its own.
ROWS: list[set[str]] = [
    {"__init__", "__main__", "cli"},
    {"llm"},
    {"commands"},
    {"doctor", "serve", "client", "models_on_disk", "options", "demo_questions"},
    {"engine"},
    {"router"},
    {"scheduling", "transfer", "models", "api", "processes"},
    {"config"},
    {"wire"},
    {"ids", "kv", "logs"},
    {"errors"},
]
ROW = {package: row for row, packages in enumerate(ROWS) for package in packages}
KV_KNOWS_NOTHING = ("kv",)
"""Another engine is to use it: no package of Tandem at all, and no tensors."""


def imported(file: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "tandem":
            found |= {f"tandem.{alias.name}" for alias in node.names if (ROOT / alias.name).exists()}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def package_of(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


FILES = {str(file.relative_to(ROOT)): file for file in sorted(ROOT.rglob("*.py"))}


@pytest.mark.parametrize("name", FILES)
def test_imports_point_down(name: str) -> None:
    own = package_of(FILES[name])
    others = {module.split(".")[1] for module in imported(FILES[name]) if module.startswith("tandem.")} - {own}
    assert {other for other in others if ROW[other] <= ROW[own]} <= ({"llm"} if own == "__init__" else set())
