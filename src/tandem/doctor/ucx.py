"""What UCX can do on this machine, asked of the very library that NIXL uses.

There is no Python interface to it and NIXL's wheels bring no `ucx_info`, so this calls four functions of its C API
(ucp.h) and reads what they print. Only to be called in a process of its own: a driver may break it.
"""

from __future__ import annotations

import ctypes
import os
import re
import tempfile

import msgspec

_FIELD_FEATURES = 1
_FEATURE_RMA = 2
_PARAMS_BYTES = 1024
"""Larger than any ucp_params_t; only the first two fields, both 64 bits, are looked at."""

_RESOURCE = re.compile(r"resource\s+\d+\s*:.*flags\s+\S+\s+(\S+)/(\S+)")


class UcxReport(msgspec.Struct, frozen=True):
    """`resources`: (transport, device), for example (tcp, eth0)."""

    version: str
    resources: list[tuple[str, str]]


def ask_ucx(library: str) -> UcxReport:
    """Raises OSError where the library is not UCX's or does not start."""
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


def parse_resources(text: str) -> list[tuple[str, str]]:
    """(transport, device) of each line such as `#  resource 1 : md 1 dev 1 flags -- tcp/eth0`."""
    return _RESOURCE.findall(text)


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
