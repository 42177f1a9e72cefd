"""The first import of the fork server: prepares it, and so all its children, for torch."""

from __future__ import annotations

from tandem import openmp

openmp.prepare()

import torch  # noqa: E402, F401  (the runtime must be there before)

openmp.drop_registration()
