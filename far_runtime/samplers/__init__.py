"""Sampling loops by system."""

from __future__ import annotations

from far_runtime.samplers import far, mar
from far_runtime.samplers.base import Sampler

SAMPLERS: dict[str, Sampler] = {"far": far, "mar": mar}
