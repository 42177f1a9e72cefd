"""NIXL's Python binding behind types and exceptions. The only file that imports nixl.

A read in NIXL's terms: both sides *register* memory and exchange *metadata* (here in our handshake, not through NIXL's
listener). The reader *adds the remote agent*, describes the read by two *descriptor lists* of equal length, one row
(address, length, device) for each run on either side, *initializes* a transfer of them, *posts* it, *checks* its state
while that is PROC, and *releases* its handle once it is DONE or ERR.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NewType

import numpy as np
from numpy.typing import NDArray

from tandem.errors import ConfigError, TransferError
from tandem.kv.runs import Runs
from tandem.transfer.transports.base import Region

log = logging.getLogger(__name__)

# The progress thread wakes up with every event of UCX, and after this long without any. Measured for ranks on two
# busy cores: idle share of a core 0.67 -> 0.01, 64 MiB over TCP 268 -> 120 ms, 8 bytes over TCP 6.0 -> 0.6 ms.
PROGRESS_DELAY_MICROSECONDS = 5_000

_BACKEND = "UCX"

Transfer = NewType("Transfer", object)
"""NIXL's handle of a read that was posted."""


class NixlError(TransferError):
    """A call of NIXL failed; the text is NIXL's."""


class NixlAgent:
    """An agent with the UCX backend, for use by one thread.

    Its methods raise NixlError where NIXL raises anything, returns None or reports "ERR".

    Args:
        name: unique; peers add this agent under it.

    Raises:
        ConfigError: NIXL is not installed, does not start, or has no UCX plugin.
    """

    def __init__(self, name: str) -> None:
        nixl = _import_nixl()
        try:
            self._agent = _new_agent(nixl, name)
        except Exception as error:
            raise ConfigError(f"NIXL does not start: {_text(error)}; try `--connector tcp`") from error
        if _BACKEND not in self._agent.backends:
            raise ConfigError("this installation of NIXL has no UCX plugin; reinstall it or use `--connector tcp`")
        self._registration: Any = None

    def register(self, region: Region) -> None:
        """Register one region: agents that have our metadata may read it, and our own reads may write into it."""
        row = (region.address, region.length, _device(region), "")
        self._registration = _call(self._agent.register_memory, [row], _memory_type(region))

    def metadata(self) -> bytes:
        """Return what another agent needs to read registered memory: addresses of this machine and UCX's keys."""
        return bytes(_call(self._agent.get_agent_metadata))

    def add_remote(self, metadata: bytes) -> str:
        """Add another agent and return its name. UCX trusts metadata: damaged bytes can end this process."""
        name = _call(self._agent.add_remote_agent, metadata)
        return name.decode() if isinstance(name, bytes) else str(name)

    def connect(self, remote: str) -> None:
        """Connect now, so that the first read need not."""
        _call(self._agent.make_connection, remote)

    def remove_remote(self, remote: str) -> None:
        """Forget another agent and disconnect. It does not stop reads in progress: their bytes still arrive."""
        _call(self._agent.remove_remote_agent, remote)

    def post_read(self, remote: str, source: Region, destination: Region, runs: Runs) -> Transfer:
        """Start reading runs from the remote agent's `source` into our `destination`. Within a host this may copy."""
        local_rows = self._descriptors(destination, runs.dst_offset, runs.length)
        remote_rows = self._descriptors(source, runs.src_offset, runs.length)
        handle = _call(self._agent.initialize_xfer, "READ", local_rows, remote_rows, remote)
        if _call(self._agent.transfer, handle) == "ERR":
            raise NixlError("the read cannot be posted")
        return Transfer(handle)

    def is_done(self, transfer: Transfer) -> bool:
        """Tell whether the read is done; False while it is in progress. Raises NixlError once it has failed."""
        state = _call(self._agent.check_xfer_state, transfer)
        if state not in ("DONE", "PROC"):
            raise NixlError(f"state {state}")
        return bool(state == "DONE")

    def release(self, transfer: Transfer) -> None:
        """Free the handle of a read that ended."""
        _call(self._agent.release_xfer_handle, transfer)

    def close(self) -> None:
        """Deregister and stop: without the progress thread nothing is written into our memory any more."""
        if self._registration is not None:
            self._agent.deregister_memory(self._registration)
        del self._agent

    def _descriptors(self, region: Region, offset: NDArray[np.int64], length: NDArray[np.int64]) -> Any:
        rows = np.empty((len(length), 3), dtype=np.uint64)
        rows[:, 0] = offset
        rows[:, 0] += np.uint64(region.address)
        rows[:, 1] = length
        rows[:, 2] = _device(region)
        descriptors = _call(self._agent.get_xfer_descs, rows, _memory_type(region))
        if descriptors is None:
            raise NixlError("the descriptors are not accepted")
        return descriptors


@dataclass(frozen=True, slots=True)
class NixlInstallation:
    """NIXL on this machine. `plugins`: backends that it can load. `ucx_library`: the libucp that it uses, if found."""

    version: str
    plugins: list[str]
    ucx_library: str | None


def nixl_installation() -> NixlInstallation:
    """Start an agent and look at what was loaded. Raises ConfigError if NIXL is not installed or does not start."""
    nixl = _import_nixl()
    try:
        agent = _new_agent(nixl, f"doctor-{os.getpid()}")
        plugins = [str(name) for name in agent.get_plugin_list()]
    except Exception as error:
        raise ConfigError(f"NIXL does not start: {_text(error)}") from error
    with open("/proc/self/maps") as maps:
        libraries = {line.split()[-1] for line in maps if "/libucp" in line}
    try:
        version = importlib.metadata.version("nixl")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    return NixlInstallation(version, plugins, min(libraries, default=None))


def _import_nixl() -> Any:
    # Must be set before the import; without them NIXL announces itself on standard output.
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    os.environ.setdefault("UCX_LOG_LEVEL", "error")
    try:
        import nixl
    except ImportError as error:
        raise ConfigError(f"NIXL cannot be imported ({error}); install `nixl` or use `--connector tcp`") from error
    return nixl


def _new_agent(nixl: Any, name: str) -> Any:
    """Make a `nixl_agent` with UCX whose progress thread sleeps while there is nothing to do.

    `nixl_agent` fixes the delay of that thread at 0, with which it spins. So the agent underneath is made here, from
    the same bindings; where they have changed, the one that spins is used.
    """
    spinning = nixl.nixl_agent_config(backends=[_BACKEND])
    try:
        settings = nixl._bindings.nixlAgentConfig()
        settings.useProgThread = True
        settings.useListenThread = False
        settings.syncMode = nixl._bindings.NIXL_THREAD_SYNC_NONE
        settings.pthrDelay = PROGRESS_DELAY_MICROSECONDS
        settings.captureTelemetry = False
        agent = nixl.nixl_agent(name, nixl.nixl_agent_config(enable_prog_thread=False, backends=[]))
        agent.agent = nixl._bindings.nixlAgent(name, settings)
    except (AttributeError, TypeError) as error:
        log.warning("NIXL's progress thread cannot be told to sleep (%s); it will keep a core busy", error)
        return nixl.nixl_agent(name, spinning)
    if _BACKEND in agent.get_plugin_list():
        agent.create_backend(_BACKEND)
    return agent


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call NIXL and raise NixlError for whatever it raises: its exceptions have no common base but Exception."""
    try:
        return function(*arguments)
    except Exception as error:
        raise NixlError(_text(error)) from error


def _text(error: Exception) -> str:
    """Return a NIXL error code as lower-case words, and any other text unchanged."""
    text = str(error) or type(error).__name__
    return text.removeprefix("NIXL_ERR_").replace("_", " ").lower() if text.startswith("NIXL_ERR_") else text


def _memory_type(region: Region) -> str:
    return "DRAM" if region.device < 0 else "VRAM"


def _device(region: Region) -> int:
    """Return the CUDA index; host memory has device 0 in NIXL."""
    return max(region.device, 0)
