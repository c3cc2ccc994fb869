"""Drawing a shard with one engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from far_runtime.images.writing import picture_bytes
from far_runtime.pipeline import Pipeline
from far_runtime.sample.run import SampleRun, Shard
from far_runtime.sample.shards import Sample, pack_shard


@dataclass(frozen=True)
class DrawnShard:
    """A shard that is drawn and packed."""

    shard: Shard
    """Which one."""

    data: bytes
    """Content of its file."""

    engine: dict[str, Any]
    """The engine that drew it (see `engine_facts`)."""

    warnings: tuple[str, ...] = ()
    """Warnings for the user."""


def draw_shard(
    pipeline: Pipeline, run: SampleRun, shard: Shard, on_batch: Callable[[int], None] = lambda count: None
) -> DrawnShard:
    """Draw and pack a shard; on_batch: called after each batch with the number of pictures that are drawn."""
    samples: list[Sample] = []
    warnings: list[str] = []
    for numbers in run.batches(shard):
        generation = pipeline.generate(
            [run.subject(number) for number in numbers],
            [run.seed + number for number in numbers],
            batch_size=run.batch_size,
            **run.settings,
        )
        for number, pixels, settings in zip(numbers, generation.images, generation.settings, strict=True):
            samples.append(Sample(run.key(number), picture_bytes(pixels, "png", settings), settings))
        warnings += generation.warnings
        on_batch(len(samples))
    data = pack_shard(run.format, samples)
    return DrawnShard(shard, data, engine_facts(pipeline), tuple(dict.fromkeys(warnings)))


def engine_facts(pipeline: Pipeline) -> dict[str, Any]:
    """What the bits of a picture depend on, beside the bundle and the settings."""
    surroundings = pipeline.surroundings()
    return {name: surroundings[name] for name in ("engine", "engine_version", "threads")}
