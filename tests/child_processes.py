"""What the children of tests/test_processes.py do; they import it by name."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

from tandem.errors import StartError

Report = Callable[..., None]


def tell(report: Report, *values: object) -> None:
    for value in values:
        report("value", value)
    stay(report)


def stay(report: Report) -> None:
    report("pid", os.getpid())
    while True:
        time.sleep(60)


def stay_whatever_comes(report: Report) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    stay(report)


def end(report: Report, code: int) -> None:
    print("one line")
    print("the last line", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def fail(report: Report, text: str) -> None:
    raise StartError(text)


def stumble(report: Report) -> None:
    raise ValueError("a bug")


def name_main(report: Report) -> None:
    report("main", getattr(sys.modules["__main__"], "__file__", None))
    report("modules", sorted(name for name in sys.modules if name.startswith(("pytest", "_pytest"))))
    stay(report)
