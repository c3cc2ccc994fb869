"""Sampling loops by system."""

from __future__ import annotations

from typing import Any

from far_runtime.sampling import far, far_t2i, mar, var
from far_runtime.sampling.base import Sampler

SAMPLERS: dict[str, Sampler[Any]] = {"far": far, "far_t2i": far_t2i, "mar": mar, "var": var}
