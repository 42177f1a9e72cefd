"""`tandem serve` as a person starts it, for the scripts of this folder."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tandem

DEMO_MODEL = Path(tandem.__file__).parent / "demo_model"
STOP_SECONDS = 15.0


def tandem_command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tandem", *map(str, arguments)]


@contextmanager
def served(*arguments: object) -> Iterator[str]:
    """The URL of a `tandem serve` with these arguments, which answers requests by now; stopped at the end."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a killed script stops its servers
    command = tandem_command("serve", *arguments, "--port", 0, "--log-level", "warning")
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip()
            if not url:
                log.seek(0)
                raise SystemExit(f"{shlex.join(command)} ended with {process.wait()}:\n{log.read()}")
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(STOP_SECONDS)


def heading() -> str:
    """The command that makes what follows, and how busy the machine is with other things."""
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    return f"$ python {shlex.join(sys.argv)}\n{os.cpu_count()} cores, load average {load}, tandem {tandem.__version__}"
