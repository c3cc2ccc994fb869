"""Floating-point operations of one picture, from the polynomials in the manifest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from far_runtime.bundle import Graph, Manifest
from far_runtime.sampling.base import Call, Step

BEFORE_LOOP, AFTER_LOOP = ("text", "context"), ("decode",)
"""Stages that run once per picture before and after the loop, where a bundle has them."""


def call_flops(manifest: Manifest, call: Call) -> float:
    """Floating-point operations of a call for one picture; a multiply-add counts as two."""
    return call.rows * call.times * row_flops(manifest.graph(call.stage, call.constants), call.sizes)


def step_flops(manifest: Manifest, step: Step) -> float:
    """Floating-point operations of one step of the loop for one picture."""
    return sum(call_flops(manifest, call) for call in step.calls)


def picture_cost(manifest: Manifest, plan: Sequence[Step]) -> dict[str, float]:
    """Floating-point operations of one picture by stage, in the order in which the stages first run."""
    before, after = ([Call(name) for name in part if manifest.has_stage(name)] for part in (BEFORE_LOOP, AFTER_LOOP))
    costs: dict[str, float] = {}
    for call in [*before, *(call for step in plan for call in step.calls), *after]:
        costs[call.stage] = costs.get(call.stage, 0.0) + call_flops(manifest, call)
    return costs


def row_flops(graph: Graph, sizes: Mapping[str, int]) -> float:
    """Floating-point operations of one row of a graph, with the sizes of its axes by name."""
    return float(sum(value * math.prod(sizes[axis] for axis in term.split()) for term, value in graph.flops.items()))
