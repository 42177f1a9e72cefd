"""Starts NIXL once and says what it has. A process of its own, since native code may hang or crash."""

from __future__ import annotations

import os
import subprocess
import sys

import msgspec

from tandem.doctor.ucx import UcxReport, ask_ucx
from tandem.errors import TransferError


class NixlReport(msgspec.Struct, frozen=True):
    """`error`: why NIXL or UCX does not start; what was learned before it is there."""

    version: str | None = None
    plugins: list[str] = []
    ucx: UcxReport | None = None
    error: str | None = None


def ask_nixl(seconds: float) -> NixlReport:
    """Raises TransferError if the process that asks crashes or takes too long."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "tandem.doctor.nixl_probe"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=seconds, env=environment, check=False)
    except subprocess.TimeoutExpired:
        raise TransferError(f"NIXL did not start within {seconds:.0f} s") from None
    lines = done.stdout.splitlines()
    try:
        return msgspec.json.decode(lines[-1] if lines else b"", type=NixlReport)
    except msgspec.DecodeError:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["it printed nothing"]
        raise TransferError(f"NIXL ended its process with code {done.returncode}: {last[0][:200]}") from None


def _report() -> NixlReport:
    from tandem.transfer.transports.nixl.agent import nixl_installation

    try:
        found = nixl_installation()
    except Exception as error:
        return NixlReport(error=str(error))
    if found.ucx_library is None:
        return NixlReport(found.version, found.plugins)
    try:
        return NixlReport(found.version, found.plugins, ask_ucx(found.ucx_library))
    except (OSError, AttributeError) as error:
        return NixlReport(found.version, found.plugins, error=str(error))


if __name__ == "__main__":
    sys.stdout.buffer.write(b"\n" + msgspec.json.encode(_report()) + b"\n")
    sys.stdout.flush()
    # Libraries of drivers are known to crash when a process unloads them.
    os._exit(0)
