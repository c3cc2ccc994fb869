"""Shared by all tests; imports no network library, so that tests of far_runtime stay torch-free."""

from __future__ import annotations

import os

# Several test processes share the machine: one thread each, set before any library starts its pool.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")
