"""What tests of several packages share."""

from __future__ import annotations

import os

# Before anything imports torch: the tests share few cores with the processes that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
