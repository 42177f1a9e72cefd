"""The documentation is true where that can be told: links lead somewhere; commands, flags and scripts exist."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from tandem.cli import app

ROOT = Path(__file__).parent.parent
PLACES = ("*.md", "docs/**/*.md", "examples/*.md", "deploy/**/*.md")
PAGES = {str(page.relative_to(ROOT)): page.read_text() for place in PLACES for page in sorted(ROOT.glob(place))}
MANIFESTS = {str(file.relative_to(ROOT)): file.read_text() for file in sorted(ROOT.glob("deploy/**/*.yaml"))}
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?:^ *|`)(tandem [a-z][^`\n]*)", re.MULTILINE)
FLAG = re.compile(r"`(--[a-z][a-z-]*)")
SCRIPT = re.compile(r"python ((?:bench|scripts|examples)/\S+\.py)")
ARGUMENTS = re.compile(r"- tandem\n((?: +- .*\n)+)")


@cache
def flags(command: str) -> set[str]:
    return {name for argument in app[command].assemble_argument_collection() for name in argument.names}


def check_command(words: list[str]) -> None:
    assert words[0] in app, words
    unknown = {word.partition("=")[0] for word in words if word.startswith("--")} - flags(words[0])
    assert not unknown, words


def anchors(text: str) -> set[str]:
    """Those that a forge makes of headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for link in LINK.findall(PAGES[name]):
        target, _, anchor = link.partition("#")
        if not target.startswith("https://"):
            file = (ROOT / name).parent / target if target else ROOT / name
            assert file.exists(), link
            assert not anchor or anchor in anchors(file.read_text()), link


@pytest.mark.parametrize("name", PAGES)
def test_commands_flags_and_scripts_exist(name: str) -> None:
    for found in COMMAND.findall(PAGES[name].replace("\\\n", " ")):
        check_command(shlex.split(found, comments=True)[1:])
    known = {"--config"}.union(*(flags(command) for command in app if not command.startswith("-")))
    assert set(FLAG.findall(PAGES[name])) <= known
    assert [script for script in SCRIPT.findall(PAGES[name]) if not (ROOT / script).is_file()] == []


@pytest.mark.parametrize("name", MANIFESTS)
def test_commands_in_manifests_exist(name: str) -> None:
    for found in ARGUMENTS.findall(MANIFESTS[name]):
        check_command([line.strip()[2:] for line in found.splitlines()])


def test_the_waits_are_those_of_the_code() -> None:
    rows = re.findall(r"\| `([\w: ]+ = [\d_.]+)` \| `([\w/.]+)` \|", PAGES["docs/timing.md"])
    assert rows
    assert [(value, file) for value, file in rows if value not in (ROOT / "src/tandem" / file).read_text()] == []
