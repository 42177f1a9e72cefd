"""Bounds checks at the boundary of a transport: nothing outside of a registered region is read or written."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tandem.errors import TransferError
from tandem.kv.runs import Runs
from tandem.transfer.transports.base import Region


def runs_inside(runs: Runs, source: Region, destination: Region) -> Runs:
    """Return the runs without empty ones. Raises TransferError unless all lie inside of both regions."""
    require_inside(runs.src_offset, runs.length, source.length, "source")
    require_inside(runs.dst_offset, runs.length, destination.length, "destination")
    return runs[runs.length > 0]


def require_inside(offset: NDArray[np.int64], length: NDArray[np.int64], size: int, name: str) -> None:
    """Raise TransferError unless 0 <= offset and offset + length <= size for every run, without overflow."""
    outside = (offset < 0) | (length < 0) | (length > size) | (offset > size - length)
    if outside.any():
        first = int(np.argmax(outside))
        raise TransferError(
            f"{int(outside.sum())} of {len(length)} runs are outside of the {name} region of {size} bytes; "
            f"the first is run {first}: offset {int(offset[first])}, length {int(length[first])}"
        )
