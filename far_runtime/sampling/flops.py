"""Arithmetic of one picture, from what the manifest knows of its graphs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from far_runtime.bundle import Graph, Manifest
from far_runtime.sampling.base import Call, Step

ONCE = ("text", "context", "decode")
"""Stages that run once a picture, before or after the loop, where a bundle has them."""


def call_flops(manifest: Manifest, call: Call) -> float:
    """Floating-point operations (a multiply-add is two) of a call for one picture."""
    return call.rows * call.times * row_flops(manifest.graph(call.stage, call.constants), call.sizes)


def step_flops(manifest: Manifest, step: Step) -> float:
    """Operations of one step of the loop for one picture."""
    return sum(call_flops(manifest, call) for call in step.calls)


def picture_cost(manifest: Manifest, plan: Sequence[Step]) -> dict[str, float]:
    """Operations of one picture by stage, in the order in which they first run."""
    before, after = ([Call(stage) for stage in part if manifest.has_stage(stage)] for part in (ONCE[:-1], ONCE[-1:]))
    costs: dict[str, float] = {}
    for call in [*before, *(call for step in plan for call in step.calls), *after]:
        costs[call.stage] = costs.get(call.stage, 0.0) + call_flops(manifest, call)
    return costs


def row_flops(graph: Graph, sizes: Mapping[str, int]) -> float:
    """Operations of one row of a graph with these sizes of its axes."""
    return float(sum(value * math.prod(sizes[axis] for axis in term.split()) for term, value in graph.flops.items()))
