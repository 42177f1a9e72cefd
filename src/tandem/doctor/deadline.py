"""Checks that cannot hang the doctor: each runs beside it and is given up when its time is over."""

from __future__ import annotations

import threading
from collections.abc import Callable

from tandem.doctor.finding import Finding, problem
from tandem.errors import TandemError


def within(seconds: float, what: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """What `check` finds, or one problem that says that it broke or took longer than `seconds`."""
    found: list[list[Finding]] = []

    def body() -> None:
        try:
            found.append(check())
        except TandemError as error:
            found.append([problem(what, str(error), "see the text")])
        except Exception as error:
            # One odd file of one odd machine must not hide what everything else says.
            found.append([problem(what, f"could not be looked at: {type(error).__name__}: {error}", "see the text")])

    thread = threading.Thread(target=body, name=f"check {what}", daemon=True)
    thread.start()
    thread.join(seconds)
    if not found:
        return [
            problem(what, f"no answer within {seconds:.0f} s", "something below it hangs: a name service, a driver")
        ]
    return found[0]
