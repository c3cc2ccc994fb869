"""Arithmetic of one picture, from what the manifest knows of its graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from far_runtime.bundle import Graph, Manifest
from far_runtime.samplers.far import Step


@dataclass(frozen=True)
class StepCost:
    """Floating-point operations of one step of the loop for one picture: transformer, and all diffusion steps."""

    transformer: float
    denoise: float


def step_costs(manifest: Manifest, plan: Sequence[Step]) -> tuple[StepCost, ...]:
    """The cost of every step of a plan; a guided step computes two rows a picture, an unguided one one."""
    costs = []
    for step in plan:
        rows = 1 if step.guidance == 1 else 2
        transformer = row_flops(manifest.graph("transformer", step.constants), step.visible)
        denoise = row_flops(manifest.graph("denoise", {}), step.visible)
        costs.append(StepCost(rows * transformer, rows * denoise * step.diffusion_steps))
    return tuple(costs)


def picture_cost(manifest: Manifest, plan: Sequence[Step]) -> dict[str, float]:
    """Floating-point operations (a multiply-add is two) of one picture by stage; the decoder runs once."""
    costs = step_costs(manifest, plan)
    return {
        "transformer": sum(cost.transformer for cost in costs),
        "denoise": sum(cost.denoise for cost in costs),
        "decode": row_flops(manifest.graph("decode", {}), 0),
    }


def row_flops(graph: Graph, visible: int) -> float:
    """Operations of one row of a graph when the encoder sees `visible` tokens."""
    return float(sum(coefficient * visible**power for power, coefficient in enumerate(graph.flops)))
