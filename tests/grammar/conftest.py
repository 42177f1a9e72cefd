"""A compiler for the bundled model: a token for each byte, then four special ones."""

from __future__ import annotations

from importlib import resources

import pytest

from tandem.api.grammars import load_compiler
from tandem.grammar.compiler import GrammarCompiler

EOS = 258


@pytest.fixture(scope="session")
def compiler() -> GrammarCompiler:
    with resources.as_file(resources.files("tandem") / "demo_model") as folder:
        return load_compiler(folder, [EOS])
