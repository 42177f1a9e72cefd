from __future__ import annotations

import numpy as np
import pytest

from tandem.errors import TransferError
from tandem.kv.runs import Runs
from tandem.transfer.transports.base import Region
from tandem.transfer.transports.bounds import runs_inside

SIZE = 200
REGION = Region(4096, SIZE)


@pytest.mark.parametrize(
    ("source", "destination", "length"),
    [
        (-1, 0, 1),
        (0, -1, 1),
        (0, 0, -1),
        (SIZE, 0, 1),
        (0, SIZE - 1, 2),
        (2**63 - 1, 0, 2**63 - 1),
        (0, 2**62, 2**62),
    ],
)
def test_runs_outside_of_a_region_are_refused(source: int, destination: int, length: int) -> None:
    with pytest.raises(TransferError, match="outside"):
        runs_inside(Runs(*np.array([[0, 0, 1], [source, destination, length]]).T), REGION, REGION)


def test_empty_runs_are_left_out() -> None:
    runs = runs_inside(Runs(*np.array([[0, 5, 0], [1, 2, 3], [SIZE, SIZE, 0]]).T), REGION, REGION)
    assert (runs.src_offset.tolist(), runs.dst_offset.tolist(), runs.length.tolist()) == ([1], [2], [3])
