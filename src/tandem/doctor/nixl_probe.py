"""Starts NIXL and UCX once and reports what they have. Run as a process of its own: native code may hang or crash.

UCX is asked in the very library that NIXL uses. There is no Python interface to it and NIXL's wheels bring no
`ucx_info`, so this calls four functions of its C API (ucp.h) and reads what they print.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import tempfile

import msgspec

from tandem.errors import TransferError

_FIELD_FEATURES = 1
_FEATURE_RMA = 2
_PARAMS_BYTES = 1024
"""Larger than any ucp_params_t; only the first two fields, both 64 bits, are looked at."""

_RESOURCE = re.compile(r"resource\s+\d+\s*:.*flags\s+\S+\s+(\S+)/(\S+)")


class UcxReport(msgspec.Struct, frozen=True):
    """`resources`: (transport, device), for example (tcp, eth0)."""

    version: str
    resources: list[tuple[str, str]]


class NixlReport(msgspec.Struct, frozen=True):
    """`error`: why NIXL or UCX does not start; what was learned before is there."""

    version: str | None = None
    plugins: list[str] = []
    ucx: UcxReport | None = None
    error: str | None = None


def probe_nixl(seconds: float) -> NixlReport:
    """Return the report of a probe process. Raises TransferError if it crashes or takes longer than `seconds`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "tandem.doctor.nixl_probe"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=seconds, env=environment, check=False)
    except subprocess.TimeoutExpired:
        raise TransferError(f"NIXL did not start within {seconds:.0f} s") from None
    try:
        return msgspec.json.decode(done.stdout.rpartition(b"\n")[2], type=NixlReport)
    except msgspec.DecodeError:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["it printed nothing"]
        raise TransferError(f"NIXL ended its process with code {done.returncode}: {last[0][:200]}") from None


def parse_resources(text: str) -> list[tuple[str, str]]:
    """Return (transport, device) of each line such as `#  resource 1 : md 1 dev 1 flags -- tcp/eth0`."""
    return _RESOURCE.findall(text)


# --- in the probe process --------------------------------------------------------------------------------------------


def _report() -> NixlReport:
    from tandem.transfer.transports.nixl.agent import nixl_installation

    report = NixlReport()
    try:
        found = nixl_installation()
        report = NixlReport(found.version, found.plugins)
        ucx = _ask_ucx(found.ucx_library) if found.ucx_library is not None else None
        return msgspec.structs.replace(report, ucx=ucx)
    except Exception as error:
        return msgspec.structs.replace(report, error=str(error))


def _ask_ucx(library: str) -> UcxReport:
    """Raises OSError or AttributeError where the library is not UCX's or does not start."""
    ucp = ctypes.CDLL(library)
    major, minor, release = ctypes.c_uint(), ctypes.c_uint(), ctypes.c_uint()
    ucp.ucp_get_version(ctypes.byref(major), ctypes.byref(minor), ctypes.byref(release))
    config, context = ctypes.c_void_p(), ctypes.c_void_p()
    params = (ctypes.c_uint64 * (_PARAMS_BYTES // 8))(_FIELD_FEATURES, _FEATURE_RMA)
    status = ucp.ucp_config_read(None, None, ctypes.byref(config))
    status = status or ucp.ucp_init_version(major, minor, params, config, ctypes.byref(context))
    if status:
        raise OSError(f"UCX does not start (status {status})")
    return UcxReport(f"{major.value}.{minor.value}.{release.value}", parse_resources(_print_info(ucp, context)))


def _print_info(ucp: ctypes.CDLL, context: ctypes.c_void_p) -> str:
    libc = ctypes.CDLL(None)
    libc.fdopen.restype = ctypes.c_void_p
    libc.fclose.argtypes = [ctypes.c_void_p]
    ucp.ucp_context_print_info.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    with tempfile.TemporaryFile() as file:
        stream = libc.fdopen(os.dup(file.fileno()), b"w")
        ucp.ucp_context_print_info(context, stream)
        libc.fclose(stream)
        file.seek(0)
        return file.read().decode(errors="replace")


if __name__ == "__main__":
    # Libraries print as well: the report is the last line.
    sys.stdout.buffer.write(b"\n" + msgspec.json.encode(_report()))
    sys.stdout.flush()
    # Libraries of drivers are known to crash when a process unloads them.
    os._exit(0)
