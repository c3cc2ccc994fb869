"""Optimisation profiles: the shapes that an engine is built for, from the graph's profile and the default schedule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from far_runtime.bundle import Bundle, Graph

Sizes = tuple[int, int, int]
Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""Smallest, usual and largest shape of every input that has a dynamic axis."""

BATCH_AXES = {"batch": 1, "rows": 2, "picked": 2, "texts": 2}
"""Axes that grow with the number of pictures, and the most rows of one picture. Guidance doubles "rows" and "picked",
and a picture has two "texts": a prompt and a negative prompt."""


def graph_profiles(bundle: Bundle, batch: Sizes | None, limit: int) -> dict[str, list[Shapes]]:
    """Profiles of every graph by name, at most `limit` for each.

    batch: smallest, usual and largest number of pictures; None: those of the export.
    Some graphs have axes other than the batch that differ from step to step of the default schedule (visible tokens,
    the keys so far). They have a profile for each step, or for a few neighbouring steps where there are more steps than
    profiles, and a last one for all other sizes. The other graphs have one profile.
    """
    calls = _calls(bundle)
    return {
        graph.name: [_shapes(graph, ranges) for ranges in _ranges(graph, calls.get(graph.name, []), batch, limit)]
        for graph in bundle.manifest.graphs
    }


def _calls(bundle: Bundle) -> dict[str, list[Mapping[str, int]]]:
    """Sizes of the axes other than the batch at every call of the default schedule, by graph, in order."""
    from far_runtime.sampling.settings import resolve_plan

    manifest = bundle.manifest
    calls: dict[str, list[Mapping[str, int]]] = {}
    for step in resolve_plan(manifest)[1]:
        for call in step.calls:
            sizes = calls.setdefault(manifest.graph(call.stage, call.constants).name, [])
            if call.sizes not in sizes:
                sizes.append(call.sizes)
    return calls


def _ranges(
    graph: Graph, calls: Sequence[Mapping[str, int]], batch: Sizes | None, limit: int
) -> list[dict[str, Sizes]]:
    full = {axis: _batched(axis, sizes, batch) for axis, sizes in graph.profile.items()}
    free = [axis for axis in full if axis not in BATCH_AXES]
    steps = [[sizes[axis] for axis in free] for sizes in calls if all(axis in sizes for axis in free)]
    if not free or limit < 2 or len(steps) < 2:
        return [full]
    groups = _groups(steps, limit - 1)
    return [
        *({**full, **dict(zip(free, map(_span, zip(*group, strict=True)), strict=True))} for group in groups), full
    ]  # fmt: skip


def _batched(axis: str, sizes: Sizes, batch: Sizes | None) -> Sizes:
    """The sizes of an axis for `batch` pictures (smallest, usual, largest); in the usual case they are guided."""
    if batch is None or axis not in BATCH_AXES:
        return sizes
    low, usual, high = batch
    rows = BATCH_AXES[axis]
    return (min(low, sizes[0]) if rows > 1 else low), usual * rows, high * rows


def _groups(steps: Sequence[Sequence[int]], count: int) -> Iterable[Sequence[Sequence[int]]]:
    """Neighbouring steps in at most `count` groups of nearly the same length."""
    count = min(count, len(steps))
    bounds = [i * len(steps) // count for i in range(count + 1)]
    return [steps[a:b] for a, b in pairwise(bounds)]


def _span(sizes: Sequence[int]) -> Sizes:
    return min(sizes), sizes[len(sizes) // 2], max(sizes)


def _shapes(graph: Graph, ranges: Mapping[str, Sizes]) -> Shapes:
    shapes: Shapes = {}
    for spec in graph.inputs:
        if any(isinstance(axis, str) for axis in spec.shape):
            low, usual, high = (
                tuple(ranges[axis][i] if isinstance(axis, str) else axis for axis in spec.shape) for i in range(3)
            )
            shapes[spec.name] = (low, usual, high)
    return shapes
