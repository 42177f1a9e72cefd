"""Models that are written once, what they are known to say, and deployments that a module's tests share."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.deployment import Deployment
from tests.support.families import FAMILIES
from tests.support.reference import Reference

Serve = Callable[..., Deployment]


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's model."""
    known: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in known:
            known[family] = FAMILIES[family].write(tmp_path_factory.mktemp("models") / family)
        return known[family]

    return folder


@pytest.fixture(scope="session")
def reference_of(folder_of: Callable[[str], Path]) -> Callable[[str], Reference]:
    """What transformers says for a family."""
    known: dict[str, Reference] = {}

    def reference(family: str) -> Reference:
        if family not in known:
            known[family] = Reference(folder_of(family))
        return known[family]

    return reference


@pytest.fixture(scope="module")
def serve(folder_of: Callable[[str], Path]) -> Iterator[Serve]:
    """Starts `tandem serve` for a family, once for the same flags in one module; one deployment runs at a time."""
    running: dict[tuple[str, ...], Deployment] = {}
    with ExitStack() as stack:

        def start(family: str, *arguments: str) -> Deployment:
            key = (family, *arguments)
            if key not in running:
                stack.close()
                running.clear()
                running[key] = stack.enter_context(Deployment(folder_of(family), *arguments))
            return running[key]

        yield start


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows what its deployment said."""
    report = yield
    if report.failed:
        values = getattr(item, "funcargs", {}).values()
        for deployment in (value for value in values if isinstance(value, Deployment)):
            report.sections.append(("log of the deployment", deployment.log[-20_000:]))
    return report
