"""The installed software: versions, CUDA devices, NIXL and what UCX makes of this machine, the cluster key."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tandem.doctor.findings import Finding, ok, problem, warning, warning_if
from tandem.doctor.machine import network_devices, size
from tandem.doctor.nixl_probe import NixlReport, UcxReport, probe_nixl
from tandem.errors import ConfigError, TransferError
from tandem.wire.keys import load_key

PROBE_SECONDS = 60.0
TORCH = ((2, 11), (2, 14))
"""From, and up to but without."""

RDMA = re.compile(r"rc|dc|ud|srd|gga")
SAME_MACHINE = ("sysv", "posix", "xpmem", "knem", "cma")
GPU = ("cuda", "gdr_copy", "rocm")


def check_versions() -> list[Finding]:
    import zmq

    from tandem import __version__

    return [
        ok("python", platform.python_version()),
        ok("tandem", __version__),
        zeromq(zmq.__version__, zmq.zmq_version(), curve=zmq.has("curve")),
    ]


def check_torch() -> list[Finding]:
    import torch

    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        devices.append(f"{index}: {torch.cuda.get_device_name(index)}, {size(free)} of {size(total)} free")
    return [
        torch_version(torch.__version__),
        cuda_devices(devices, torch.version.cuda, driver=os.path.exists("/dev/nvidiactl")),
    ]


def check_nixl() -> list[Finding]:
    import torch

    if importlib.util.find_spec("nixl") is None:
        return [warning("nixl", "not installed", "KV moves over the slower tcp connector; `pip install nixl`")]
    try:
        report = probe_nixl(PROBE_SECONDS)
    except TransferError as error:
        return [problem("nixl", str(error), "reinstall `nixl` for this CUDA version, or use --connector tcp")]
    environment = {name: value for name, value in sorted(os.environ.items()) if name.startswith("UCX_")}
    return [
        *nixl(report),
        *(ucx(report.ucx, environment, torch.cuda.is_available()) if report.ucx else []),
        ucx_settings(environment, network_devices()),
    ]


def zeromq(pyzmq: str, libzmq: str, *, curve: bool) -> Finding:
    text = f"{pyzmq}, libzmq {libzmq}"
    if not curve:
        return problem("pyzmq", f"{text} without CURVE", "internal sockets cannot be encrypted; `pip install pyzmq`")
    return ok("pyzmq", f"{text} with CURVE")


def torch_version(version: str) -> Finding:
    (low, high), match = TORCH, re.match(r"(\d+)\.(\d+)", version)
    good = match is not None and low <= (int(match[1]), int(match[2])) < high
    wanted = f">={low[0]}.{low[1]},<{high[0]}.{high[1]}"
    advice = f"Tandem is tested with torch {wanted}; `pip install 'torch{wanted}'`"
    return warning_if(not good, "torch", version, advice)


def cuda_devices(devices: Sequence[str], built_for: str | None, *, driver: bool) -> Finding:
    """`built_for`: the CUDA version of this torch; None if it has none. `driver`: an NVIDIA driver is loaded."""
    if devices:
        return ok("CUDA devices", "; ".join(devices))
    why = f"torch is built for CUDA {built_for}" if built_for else "this torch is built without CUDA"
    return warning_if(
        driver,
        "CUDA devices",
        f"none that torch can use, though a driver is loaded; {why}" if driver else "none; engines compute on the CPU",
        "install a torch for this driver's CUDA version, or start engines with --device cpu",
    )


def nixl(report: NixlReport) -> list[Finding]:
    if report.version is None:
        return [problem("nixl", report.error or "does not start", "reinstall `nixl` or use --connector tcp")]
    found, plugins = [ok("nixl", report.version)], ", ".join(report.plugins) or "none"
    if "UCX" not in report.plugins:
        advice = "connector nixl needs it; reinstall `nixl`, unset NIXL_PLUGIN_DIR, or use --connector tcp"
        return [*found, problem("NIXL plugins", f"{plugins}; UCX is not among them", advice)]
    found.append(ok("NIXL plugins", plugins))
    if report.ucx is None:
        found.append(warning("UCX", report.error or "its library was not found", "its transports are not known"))
    return found


def ucx(report: UcxReport, environment: Mapping[str, str], cuda: bool) -> list[Finding]:
    """`cuda`: whether KV would be in GPU memory."""
    devices: dict[str, list[str]] = {}
    for transport, device in report.resources:
        devices.setdefault(transport, []).append(device)
    text = ", ".join(
        name if name in (*SAME_MACHINE, "self") else f"{name} ({' '.join(where)})" for name, where in devices.items()
    )
    advice = _ucx_advice(set(devices), environment, cuda)
    return [ok("UCX", report.version), warning_if(bool(advice), "UCX transports", text or "none", advice)]


def _ucx_advice(transports: set[str], environment: Mapping[str, str], cuda: bool) -> str:
    """Return what to do about transports that should be there and are not; empty if none is missing."""
    limited = f" (UCX_TLS={environment['UCX_TLS']} limits them)" if "UCX_TLS" in environment else ""
    if not any(name == "tcp" or RDMA.match(name) for name in transports):
        return f"none of them leaves this machine{limited}: unset UCX_TLS and UCX_NET_DEVICES, or use --connector tcp"
    if cuda and not any(name.startswith(GPU) for name in transports):
        return f"none of them reaches GPU memory{limited}: install the nixl wheel for this CUDA version"
    if not transports & set(SAME_MACHINE):
        return f"none of them is for two processes of one machine{limited}: those will use the network"
    if not transports & {"cma", "xpmem"}:
        return (
            f"no cma{limited}: reads within this machine are copied twice; allow process_vm_readv"
            " (docker --cap-add SYS_PTRACE, Kubernetes: capabilities add SYS_PTRACE)"
        )
    return ""


def ucx_settings(environment: Mapping[str, str], devices: set[str]) -> Finding:
    text = " ".join(f"{name}={value}" for name, value in environment.items()) or "none set"
    chosen = environment.get("UCX_NET_DEVICES", "all").lstrip("^").split(",")
    unknown = ", ".join(name for name in chosen if name not in devices | {"all"})
    if unknown:
        advice = f"UCX_NET_DEVICES takes names among {', '.join(sorted(devices))}"
        return problem("UCX settings", f"{text}; there is no {unknown} here", advice)
    return ok("UCX settings", text)


def check_key(path: Path | None) -> list[Finding]:
    if path is None:
        return [ok("cluster key", "none given; internal sockets stay on loopback")]
    try:
        load_key(path)
    except ConfigError as error:
        return [problem("cluster key", str(error), "every process of the cluster needs a readable copy of one key")]
    return [ok("cluster key", f"{path}, permissions {path.stat().st_mode & 0o777:o}")]
