"""Targets of the children of tests/test_processes.py, which import them by name."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

from tandem.errors import RankLost, StartError
from tandem.reports import Drained, Ended, Following, Loading, Reporter


def load(report: Reporter, total: int) -> None:
    for loaded in range(total):
        report(Loading(loaded, total))
    stay(report)


def stay(report: Reporter) -> None:
    report(Following())
    while True:
        time.sleep(60)


def stay_whatever_comes(report: Reporter) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    stay(report)


def end(report: Reporter, code: int) -> None:
    print("one line")
    print("the last line", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end_well(report: Reporter, reason: str) -> None:
    report(Ended(reason))


def drain(report: Reporter, reason: str) -> None:
    report(Drained(reason))


def fail(report: Reporter, text: str) -> None:
    raise StartError(text)


def lose_rank(report: Reporter, text: str) -> None:
    raise RankLost(text)


def stumble(report: Reporter) -> None:
    raise ValueError("a bug")


def name_main(report: Reporter) -> None:
    pytest_modules = sorted(name for name in sys.modules if name.startswith(("pytest", "_pytest")))
    main = getattr(sys.modules["__main__"], "__file__", None)
    report(Ended(json.dumps({"main": main, "modules": pytest_modules})))
