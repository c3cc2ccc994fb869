"""Drawing a shard with one engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from far_runtime.images.writing import picture_bytes
from far_runtime.pipeline import Pipeline
from far_runtime.sample.plan import Plan, Shard
from far_runtime.sample.shards import Sample, packed


@dataclass(frozen=True)
class Made:
    """A shard's file. engine: what drew it, as `engine_of` has it. warnings: what the user should know."""

    shard: Shard
    data: bytes
    engine: dict[str, Any]
    warnings: tuple[str, ...] = ()


def draw_shard(pipeline: Pipeline, plan: Plan, shard: Shard, done: Callable[[int], None] = lambda count: None) -> Made:
    """Draw and pack a shard. done: told how many pictures there are, batch by batch."""
    samples: list[Sample] = []
    warnings: list[str] = []
    for numbers in plan.batches(shard):
        made = pipeline.generate(
            [plan.subject(number) for number in numbers],
            [plan.seed + number for number in numbers],
            batch_size=plan.batch,
            **plan.settings,
        )
        for number, pixels, settings in zip(numbers, made.images, made.settings, strict=True):
            samples.append(Sample(plan.key(number), picture_bytes(pixels, "png", settings), settings))
        warnings += made.warnings
        done(len(samples))
    return Made(shard, packed(plan.format, samples), engine_of(pipeline), tuple(dict.fromkeys(warnings)))


def engine_of(pipeline: Pipeline) -> dict[str, Any]:
    """What pictures' bits depend on beside the bundle and their settings."""
    around = pipeline.surroundings()
    return {name: around[name] for name in ("engine", "engine_version", "threads")}
