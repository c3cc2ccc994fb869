"""Sampling loops by system."""

from __future__ import annotations

from far_runtime.samplers import far

SAMPLERS = {"far": far}
