"""Pipeline: labels and seeds into pictures, through a bundle's stages on one engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from far_runtime import __version__
from far_runtime.bundle import Bundle, open_bundle
from far_runtime.defaults import Settings, check_system, schedule_of, settings_of
from far_runtime.engines import DEFAULT_ENGINE, open_engine
from far_runtime.engines.base import Array, Engine
from far_runtime.errors import FarError
from far_runtime.frequency import lowpass
from far_runtime.labels import resolve_label
from far_runtime.noise import SeedNoise
from far_runtime.samplers import SAMPLERS
from far_runtime.samplers.far import Step
from far_runtime.schedule import Schedule
from far_runtime.settings import PictureSettings

DEFAULT_BATCH = 8


@dataclass(frozen=True)
class Progress:
    """How far `generate` is: `diffused` diffusion steps of `step`, one of `levels` steps of the loop, in `batch` (from
    0) of `batches`; in all `done` of `total` diffusion steps."""

    batch: int
    batches: int
    step: Step
    levels: int
    diffused: int
    done: int
    total: int


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class Generation:
    """Pictures with what they came from, in the order of the labels.

    images: uint8 [N, H, W, 3]. latents: float32 [N, L, C], scaled. settings: one per picture. Where asked for, and None
    otherwise, level_latents: [N, levels, L, C], the sample after each level; level_images: uint8 [N, levels, H, W, 3],
    those samples low-passed to the next entry of the level list (the last as it is) and decoded.
    """

    images: NDArray[np.uint8]
    latents: NDArray[np.float32]
    settings: tuple[PictureSettings, ...]
    level_latents: NDArray[np.float32] | None = None
    level_images: NDArray[np.uint8] | None = None

    def __getitem__(self, rows: slice) -> Generation:
        """Some of the pictures."""
        return Generation(
            self.images[rows],
            self.latents[rows],
            self.settings[rows],
            None if self.level_latents is None else self.level_latents[rows],
            None if self.level_images is None else self.level_images[rows],
        )


class Pipeline:
    """Draws pictures from a bundle.

    >>> with Pipeline.from_bundle("far-b") as pipeline:
    ...     made = pipeline.generate(["golden retriever", 3], seeds=[0, 0])
    """

    def __init__(self, bundle: Bundle, engine: Engine, threads: int | None = None) -> None:
        """A pipeline over an open engine; `threads` is what the engine was given, for the record.

        Raises FarError for a bundle of a system that has no sampling loop here.
        """
        check_system(bundle)
        self.bundle = bundle
        self.engine = engine
        self.threads = threads

    @classmethod
    def from_bundle(
        cls, path: str | Path, engine: str = DEFAULT_ENGINE, threads: int | None = None, check: bool = True
    ) -> Pipeline:
        """Open a bundle (comparing its checksums unless check=False) on the named engine.

        Raises FarError for a bundle that is missing or damaged and for an engine that cannot be had.
        """
        if threads is not None and threads < 1:
            raise FarError(f"{threads} threads: expected 1 or more; use --threads 2, say")
        bundle = open_bundle(path, check)
        return cls(bundle, open_engine(bundle, engine, threads), threads)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the engine's memory back."""
        self.engine.close()

    def labels(self, labels: Sequence[int | str]) -> list[int]:
        """Numbers of labels given by number or name; FarError for one that is out of range, unknown or ambiguous."""
        manifest = self.bundle.manifest
        return [resolve_label(label, manifest.model["classes"], manifest.classes) for label in labels]

    def surroundings(self) -> dict[str, Any]:
        """What a picture's bits depend on beside its own settings, under the names of `PictureSettings`."""
        return {
            "bundle": self.bundle.manifest.id,
            "engine": self.engine.name,
            "engine_version": str(getattr(self.engine, "version", "")),
            "threads": self.threads,
            "version": __version__,
        }

    def generate(
        self,
        labels: Sequence[int | str],
        seeds: Sequence[int],
        guidance: float | None = None,
        temperature: float | None = None,
        steps: str | int | Sequence[int] | None = None,
        levels: Sequence[int] | None = None,
        batch_size: int = DEFAULT_BATCH,
        on_progress: OnProgress | None = None,
        save_levels: bool = False,
    ) -> Generation:
        """Draw one picture per label and seed, `batch_size` at a time; what is None is the bundle's default.

        A picture depends on its own label, seed and settings alone, up to the engine's rounding. steps: a number, one
        per level, or "40:100", linear from the first level to the last. Raises FarError for numbers that cannot be.
        """
        numbers = self.labels(labels)
        if not numbers:
            raise FarError("no labels; give one or more with --label")
        if len(seeds) != len(numbers):
            raise FarError(f"{len(seeds)} seeds for {len(numbers)} labels; give one seed per picture")
        if batch_size < 1:
            raise FarError(f"batch size {batch_size}: expected 1 or more; use --batch-size {DEFAULT_BATCH}, say")
        settings = settings_of(self.bundle.manifest, guidance, temperature, steps, levels)
        schedule = schedule_of(self.bundle.manifest, settings)
        pictures = self._pictures(
            numbers, SeedNoise([int(seed) for seed in seeds]).seeds, settings, schedule, batch_size
        )
        batches = [pictures[start : start + batch_size] for start in range(0, len(pictures), batch_size)]
        report = _reporter(schedule, len(batches), on_progress)
        return _joined([self._batch(batch, schedule, report(i), save_levels) for i, batch in enumerate(batches)])

    def like(
        self, picture: PictureSettings, on_progress: OnProgress | None = None, save_levels: bool = False
    ) -> Generation:
        """One picture made again: in its place of a batch of the same size, whose other rows are copies of it.

        Same bundle, engine and machine: every bit is the same. `PictureSettings.differences` tells what is not.
        """
        made = self.generate(
            [picture.label] * picture.batch,
            [picture.seed] * picture.batch,
            guidance=picture.guidance,
            temperature=picture.temperature,
            steps=picture.steps,
            levels=picture.levels,
            batch_size=picture.batch,
            on_progress=on_progress,
            save_levels=save_levels,
        )
        return made[picture.index : picture.index + 1]

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Pictures uint8 [B, H, W, 3] of scaled latents [B, L, C]."""
        return self._decode(self.engine.put(latents))

    def _decode(self, latents: Array) -> NDArray[np.uint8]:
        pixels: NDArray[np.uint8] = self.engine.get(self.engine.run("decode", {"latents": latents})["pixels"])
        return pixels

    def _batch(
        self,
        pictures: tuple[PictureSettings, ...],
        schedule: Schedule,
        report: Callable[[Step, int], None],
        save_levels: bool,
    ) -> Generation:
        """Pictures that are computed together."""
        samples: list[NDArray[np.float32]] = []

        def on_step(step: Step, diffused: int, state: Array) -> None:
            if save_levels and diffused == step.diffusion_steps:
                samples.append(self.engine.get(state).copy())
            report(step, diffused)

        state = SAMPLERS[self.bundle.manifest.system].sample(
            self.engine,
            self.bundle.manifest.model,
            schedule,
            [picture.label for picture in pictures],
            SeedNoise([picture.seed for picture in pictures]),
            on_step,
        )
        images, latents = self._decode(state), self.engine.get(state).copy()
        if not np.isfinite(latents).all():
            raise FarError(
                f"the latents are not finite at guidance {pictures[0].guidance:g}, temperature "
                f"{pictures[0].temperature:g}; try less --guidance, or far verify to see where it begins"
            )
        if not save_levels:
            return Generation(images, latents, pictures)
        kept = zip(samples, schedule.levels[1:], strict=False)  # one less: nothing is dropped from the last sample
        seen = [self.decode(lowpass(sample, level)) for sample, level in kept]
        return Generation(images, latents, pictures, np.stack(samples, axis=1), np.stack([*seen, images], axis=1))

    def _pictures(
        self, labels: Sequence[int], seeds: Sequence[int], settings: Settings, schedule: Schedule, batch_size: int
    ) -> tuple[PictureSettings, ...]:
        """The record of every picture."""
        manifest, count, surroundings = self.bundle.manifest, len(labels), self.surroundings()
        return tuple(
            PictureSettings(
                label=label,
                name=manifest.classes[label] if manifest.classes else "",
                seed=seed,
                guidance=settings.guidance,
                temperature=settings.temperature,
                levels=schedule.levels,
                steps=schedule.steps,
                batch=min(batch_size, count - i // batch_size * batch_size),
                index=i % batch_size,
                **surroundings,
            )
            for i, (label, seed) in enumerate(zip(labels, seeds, strict=True))
        )


def _reporter(
    schedule: Schedule, batches: int, on_progress: OnProgress | None
) -> Callable[[int], Callable[[Step, int], None]]:
    """For each batch, what to call after every diffusion step."""
    per_batch = sum(schedule.steps)

    def of_batch(batch: int) -> Callable[[Step, int], None]:
        def report(step: Step, diffused: int) -> None:
            if on_progress is not None:
                done = batch * per_batch + sum(schedule.steps[: step.index]) + diffused
                on_progress(Progress(batch, batches, step, len(schedule), diffused, done, batches * per_batch))

        return report

    return of_batch


def _joined(parts: Sequence[Generation]) -> Generation:
    """The batches of one call as one."""
    level_latents = [part.level_latents for part in parts if part.level_latents is not None]
    level_images = [part.level_images for part in parts if part.level_images is not None]
    return Generation(
        np.concatenate([part.images for part in parts]),
        np.concatenate([part.latents for part in parts]),
        tuple(one for part in parts for one in part.settings),
        np.concatenate(level_latents) if level_latents else None,
        np.concatenate(level_images) if level_images else None,
    )
