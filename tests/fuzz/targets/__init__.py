"""The targets in this process, by name."""

from __future__ import annotations

from tests.fuzz.target import Target
from tests.fuzz.targets.codecs import Codecs
from tests.fuzz.targets.decode import Decode
from tests.fuzz.targets.engine import Engine
from tests.fuzz.targets.http import HttpApi
from tests.fuzz.targets.prefill import Prefill
from tests.fuzz.targets.router import Router
from tests.fuzz.targets.tcp import Tcp

TARGETS: dict[str, type[Target]] = {one.NAME: one for one in (Codecs, Prefill, Decode, Engine, Router, Tcp, HttpApi)}
