"""Imports point down: only to packages of a lower row. A new package needs a place in one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import tandem

ROOT = Path(tandem.__file__).parent
ROWS = (
    {"__init__", "__main__"},
    {"cli", "llm"},
    {"commands"},
    {"doctor", "local_cluster", "client", "config_file", "demo_questions"},
    {"engine", "vllm"},
    {"router"},
    {"supervisor"},
    {"scheduling", "transfer", "models", "api", "processes"},
    {"child_main", "fork_server"},
    {"config", "console", "reports"},
    {"config_access", "config_limits", "grammar"},
    {"flags"},
    {"wire"},
    {
        "kv",
        "checkpoint",
        "ids",
        "logs",
        "deadlines",
        "model_folder",
        "openmp",
        "bounded_writer",
        "restart_policy",
        "runtime_folder",
    },
    {"errors"},
)
ROW = {package: row for row, packages in enumerate(ROWS) for package in packages}
FILES = {str(file.relative_to(ROOT)): file for file in sorted(ROOT.rglob("*.py"))}
ANOTHER_ENGINE_MAY_USE = {
    "kv": set(),
    "transfer": {"kv", "wire", "ids", "errors"},
    "vllm": {"kv", "transfer", "wire", "ids", "errors", "checkpoint", "model_folder", "config_access"},
}
IMPORT_VLLM = {"vllm/connector.py", "vllm/stats.py", "vllm/self_test.py", "vllm/__init__.py"}


def imported(file: Path) -> set[str]:
    """The modules that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.Import(names=names):
                found |= {alias.name for alias in names}
            case ast.ImportFrom(module="tandem", names=names):
                found |= {f"tandem.{alias.name}" for alias in names if alias.name in ROW}
            case ast.ImportFrom(module=str(module)):
                found.add(module)
    return found


def packages(file: Path) -> tuple[str, set[str]]:
    """The package of a file, and those of Tandem's that it imports."""
    own = file.relative_to(ROOT).parts[0].removesuffix(".py")
    return own, {module.split(".")[1] for module in imported(file) if module.startswith("tandem.")} - {own}


@pytest.mark.parametrize("name", FILES)
def test_imports_point_down(name: str) -> None:
    own, others = packages(FILES[name])
    assert {other for other in others if ROW[other] <= ROW[own]} == set()


def test_what_another_engine_may_use_knows_nothing_of_this_one() -> None:
    for name, file in FILES.items():
        own, others = packages(file)
        assert others <= ANOTHER_ENGINE_MAY_USE.get(own, others), name


def test_the_pure_packages_know_no_tensors_and_only_one_file_knows_nixl() -> None:
    outside = {name: {module.split(".")[0] for module in imported(file)} for name, file in FILES.items()}
    assert not [
        name for name in outside if name.startswith(("kv/", "checkpoint/", "scheduling/")) and "torch" in outside[name]
    ]
    assert [name for name in outside if "nixl" in outside[name]] == ["transfer/transports/nixl/agent.py"]


def test_vllm_is_known_to_its_connector_alone_which_can_be_imported_without_it() -> None:
    assert {name for name in FILES if any(m.split(".")[0] == "vllm" for m in imported(FILES[name]))} == IMPORT_VLLM
    assert not [name for name in FILES if not name.startswith("vllm/") and "vllm" in packages(FILES[name])[1]]
    top = ast.parse(FILES["vllm/__init__.py"].read_text()).body
    assert not [node for node in top if isinstance(node, ast.ImportFrom) and str(node.module).startswith("vllm")]
