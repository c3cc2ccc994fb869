"""Pipeline: labels or prompts, and seeds, into pictures, through a bundle's stages on one engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from far_runtime import __version__
from far_runtime.bundle import Bundle, Manifest, open_bundle
from far_runtime.conditioning.cache import LIMIT, ConditionCache
from far_runtime.conditioning.subjects import Subject, condition_of, is_null, resolve_subjects, takes_text
from far_runtime.engines import open_engine
from far_runtime.engines.base import Array, Engine, EngineOptions, run_generation
from far_runtime.errors import FarError, NotFinite
from far_runtime.generation import Generation, OnLevel, OnProgress, joined, reporter
from far_runtime.images.metadata import PictureMetadata
from far_runtime.sampling.base import KeptRegion, Step
from far_runtime.sampling.noise import SeedNoise
from far_runtime.sampling.settings import (
    batch_key,
    check_system,
    merge_guidance,
    option,
    plan_of,
    resolve_settings,
    sampler_of,
    without_guidance,
)
from far_runtime.sampling.systems import SAMPLERS

DEFAULT_BATCH = 8


LARGEST_DEVIATION = 10.0
"""Of latents, whose scale is about 1. What a network far off at the first timestep leaves is hundreds of times that."""


def unsteady(manifest: Manifest, latents: NDArray[np.float32]) -> tuple[str, ...]:
    """A warning where a diffusion system's latents [B, L, C] are far larger than any that it was trained on."""
    deviation = float(latents.std())
    if "steps" not in SAMPLERS[manifest.system].SETTINGS or deviation <= LARGEST_DEVIATION:
        return ()
    return (
        f"the latents' standard deviation is {deviation:.0f} where about 1 is right: the network may be unsteady at "
        "the first diffusion steps; try --start 950, a --preset other than official, or less --guidance",
    )


class Pipeline:
    """Draws pictures from a bundle.

    >>> with Pipeline.from_bundle("far-b") as pipeline:
    ...     made = pipeline.generate(["golden retriever", 3], seeds=[0, 0])
    """

    def __init__(self, bundle: Bundle, engine: Engine, threads: int | None = None, cache_bytes: int = LIMIT) -> None:
        """A pipeline over an open engine; `threads` is what the engine was given, for the record. remember: bytes of
        what depends on a label or prompt alone (`ConditionCache`) that are kept for further pictures; 0: none is.

        Raises FarError for a bundle of a system that has no sampling loop here.
        """
        check_system(bundle)
        self.bundle = bundle
        self.engine = engine
        self.threads = threads
        self._condition_cache = ConditionCache(engine, bundle, cache_bytes)

    @classmethod
    def from_bundle(
        cls,
        path: str | Path,
        engine: str | None = None,
        threads: int | None = None,
        check: bool = True,
        options: EngineOptions | None = None,
    ) -> Pipeline:
        """Open a bundle (comparing its checksums unless check=False) on the named engine, or the best one here.

        threads: short for options=EngineOptions(threads=...).

        Raises FarError for a bundle that is missing or damaged and for an engine that cannot be had.
        """
        if threads is not None and threads < 1:
            raise FarError(f"{threads} threads: expected 1 or more; use --threads 2, say")
        options = replace(options or EngineOptions(), threads=threads or (options.threads if options else None))
        return cls.over(open_bundle(path, check), engine, options)

    @classmethod
    def over(cls, bundle: Bundle, engine: str | None = None, options: EngineOptions | None = None) -> Pipeline:
        """A pipeline over a bundle that is open, on the named engine; FarError for an engine that cannot be had."""
        options = options or EngineOptions()
        return cls(bundle, open_engine(bundle, engine, options), options.threads)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the engine's memory back."""
        self.engine.close()

    def surroundings(self) -> dict[str, Any]:
        """What a picture's bits depend on beside its own settings, under the names of `PictureMetadata`."""
        return {
            "bundle": self.bundle.manifest.id,
            "engine": self.engine.name,
            "engine_version": str(getattr(self.engine, "version", "")),
            "threads": self.threads,
            "version": __version__,
        }

    def generate(
        self,
        subjects: Sequence[int | str | Subject],
        seeds: Sequence[int],
        *,
        negative: str = "",
        batch_size: int = DEFAULT_BATCH,
        on_progress: OnProgress | None = None,
        save_levels: bool = False,
        on_level: OnLevel | None = None,
        **sampling: Any,
    ) -> Generation:
        """Draw one picture per subject and seed, `batch_size` at a time.

        subjects: labels by number or name, or prompts, whichever the bundle draws from. negative: a prompt to lead away
        from. sampling: the system's settings (`Sampler.SETTINGS`) by name, such as guidance=2.5; what is None or absent
        is the bundle's default; guidance may be a sequence, a scale for each picture. on_level: called with every
        step's number and pictures [B, H, W, 3] as soon as a batch has them, the last with the finished ones. A picture
        depends on its own subject, seed and settings alone, up to the engine's rounding. Raises FarError for subjects
        and settings that cannot be.
        """
        wanted = self.subjects(subjects, negative)
        self._check(wanted, seeds, batch_size)
        settings = self._settings(sampling, len(wanted))
        pictures = self._pictures(wanted, SeedNoise([int(seed) for seed in seeds]).seeds, settings, batch_size)
        return self._draw(pictures, batch_size, on_progress, save_levels, on_level=on_level)

    def edit(
        self,
        subjects: Sequence[int | str | Subject],
        seeds: Sequence[int],
        image: NDArray[np.uint8],
        keep: NDArray[np.bool_],
        *,
        edited: Mapping[str, str] | None = None,
        negative: str = "",
        batch_size: int = DEFAULT_BATCH,
        on_progress: OnProgress | None = None,
        save_levels: bool = False,
        on_level: OnLevel | None = None,
        **sampling: Any,
    ) -> Generation:
        """Draw pictures that keep part of an image: its latents stand where every pixel of their cell is kept.

        subjects: as `generate` takes them, or `null_subject` to let the image alone say what to draw; guidance, which
        would then lead nowhere, is left out if all are. image: uint8 [H, W, 3] of the bundle's size. keep: [H, W], True
        where the image stays. edited: what to record of where they came from. The pixels are the decoder's everywhere;
        far_runtime.images.edit puts the image's own back. Raises FarError for a bundle without the encode
        stage, where all of the image is kept, and as `generate` does.
        """
        wanted = self.subjects(subjects, negative)
        self._check(wanted, seeds, batch_size)
        settings = self._settings(sampling, len(wanted))
        if all(is_null(self.bundle.manifest, subject) for subject in wanted):
            settings = [without_guidance(self.bundle.manifest, one) for one in settings]
        pictures = self._pictures(
            wanted, SeedNoise([int(seed) for seed in seeds]).seeds, settings, batch_size, dict(edited or {})
        )
        return self._draw(pictures, batch_size, on_progress, save_levels, self._known(image, keep), on_level)

    def like(
        self, picture: PictureMetadata, on_progress: OnProgress | None = None, save_levels: bool = False
    ) -> Generation:
        """One picture made again: in its place of a batch of the same size, whose other rows are copies of it.

        Same bundle, engine and machine: every bit is the same, unless a step of the picture was unguided beside guided
        ones of its batch, which is the same up to rounding. `PictureMetadata.differences` tells what is not. Raises
        FarError for an edited picture, which does not hold the image that it came from.
        """
        if picture.edited:
            raise FarError("the picture was edited from another one; repeat it with far edit and the same files")
        made = self.generate(
            [picture.subject] * picture.batch,
            [picture.seed] * picture.batch,
            batch_size=picture.batch,
            on_progress=on_progress,
            save_levels=save_levels,
            **picture.sampling,
        )
        return made[picture.index : picture.index + 1]

    def subjects(self, subjects: Sequence[int | str | Subject], negative: str = "") -> list[Subject]:
        """Subjects of labels by number or name, or of prompts; FarError for a label that is out of range, unknown or
        ambiguous."""
        manifest = self.bundle.manifest
        found = []
        for one in subjects:
            if isinstance(one, Subject) and is_null(manifest, one):
                found.append(one)
                continue
            given = one if isinstance(one, Subject) else Subject(None, str(one), negative)
            text = takes_text(manifest) if not isinstance(one, Subject) else given.label is None
            labels: list[int | str] = [] if text else [given.name if given.label is None else given.label]
            found += resolve_subjects(manifest, labels, [given.name] if text else [], given.negative)
        return found

    def _settings(self, sampling: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
        """The resolved settings of every picture."""
        scales = sampling.get("guidance")
        if not isinstance(scales, list | tuple | np.ndarray):
            return [resolve_settings(self.bundle.manifest, sampling)] * count
        if len(scales) != count:
            raise FarError(f"{len(scales)} scales of guidance for {count} pictures; give one, or one per picture")
        numbers = [float(scale) for scale in scales]
        by_scale = {one: resolve_settings(self.bundle.manifest, {**sampling, "guidance": one}) for one in set(numbers)}
        return [by_scale[one] for one in numbers]

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Pictures uint8 [B, H, W, 3] of what the loop ends with (scaled latents [B, L, C])."""
        pixels: NDArray[np.uint8] = self.engine.get(self._decode(self.engine, self.engine.put(latents)))
        return pixels

    def _decode(self, engine: Engine, latents: Array) -> Array:
        return engine.run("decode", {"latents": latents})["pixels"]

    def _check(self, subjects: Sequence[Subject], seeds: Sequence[int], batch_size: int) -> None:
        option, kind = ("--prompt", "prompts") if takes_text(self.bundle.manifest) else ("--label", "labels")
        if not subjects:
            raise FarError(f"no {kind}; give one or more with {option}")
        if len(seeds) != len(subjects):
            raise FarError(f"{len(seeds)} seeds for {len(subjects)} {kind}; give one seed per picture")
        if batch_size < 1:
            raise FarError(f"batch size {batch_size}: expected 1 or more; use --batch-size {DEFAULT_BATCH}, say")

    def _known(self, image: NDArray[np.uint8], keep: NDArray[np.bool_]) -> Callable[[int], KeptRegion]:
        """What an edit keeps, for a batch of so many pictures."""
        size = self.bundle.manifest.model["image_size"]
        if image.shape != (size, size, 3) or keep.shape != (size, size):
            raise FarError(
                f"image of {image.shape[1]} x {image.shape[0]} pixels, mask of {keep.shape[1]} x {keep.shape[0]}: this "
                f"bundle edits pictures of {size} x {size}"
            )
        if not any(graph.stage == "encode" for graph in self.bundle.manifest.graphs):
            raise FarError(
                f"{self.bundle.path}: has no encode stage, so it cannot edit; export it again without --no-editing"
            )
        if keep.all():
            raise FarError("the mask keeps every pixel, so there is nothing to change; mark what is to be drawn anew")
        latents = self.engine.get(self.engine.run("encode", {"pixels": self.engine.put(image[None])})["latents"]).copy()
        grid = self.bundle.manifest.model["grid"]
        cells = keep.reshape(1, grid, size // grid, grid, size // grid).all(axis=(2, 4))
        return lambda batch: KeptRegion(
            self.engine.put(np.repeat(latents, batch, axis=0)), np.repeat(cells, batch, axis=0)
        )

    def _draw(
        self,
        pictures: tuple[PictureMetadata, ...],
        batch_size: int,
        on_progress: OnProgress | None,
        save_levels: bool,
        known: Callable[[int], KeptRegion] | None = None,
        on_level: OnLevel | None = None,
    ) -> Generation:
        """All pictures, batch by batch."""
        batches = [pictures[start : start + batch_size] for start in range(0, len(pictures), batch_size)]
        plan = plan_of(self.bundle.manifest, pictures[0].sampling)
        report = reporter(plan, len(batches), on_progress)
        parts = [self._batch(batch, report(i), save_levels, known, on_level) for i, batch in enumerate(batches)]
        made = joined(parts)
        warnings = (*made.warnings, *unsteady(self.bundle.manifest, made.latents))
        return replace(made, step_names=tuple(step.name for step in plan), warnings=warnings)

    def _batch(
        self,
        pictures: tuple[PictureMetadata, ...],
        report: Callable[[Step, int], None],
        save_levels: bool,
        known: Callable[[int], KeptRegion] | None = None,
        on_level: OnLevel | None = None,
    ) -> Generation:
        """Pictures that are computed together."""
        manifest = self.bundle.manifest
        sampler = sampler_of(manifest)
        settings = merge_guidance([picture.sampling for picture in pictures])
        last = len(plan_of(manifest, settings)) - 1
        samples: list[NDArray[np.float32]] = []
        seen: list[NDArray[np.uint8]] = []

        def on_step(step: Step, done: int, state: Array) -> None:
            if (save_levels or on_level) and done == step.substeps:
                samples.append(self.engine.get(state).copy())
                if on_level and step.index < last:  # the newest twice: as the last one it would be shown as it is
                    view = sampler.preview_latents(manifest.model, settings, [*samples, samples[-1]])[step.index]
                    seen.append(self.decode(view).copy())
                    on_level(step.index, seen[-1])
            report(step, done)

        subjects = [picture.subject for picture in pictures]
        features, cut = self._condition_cache.features(subjects)
        # Where an edit keeps something, the first step may see it.
        first = None if known else self._condition_cache.first(settings, subjects, features)
        warnings: tuple[str, ...] = ()

        def make(engine: Engine) -> dict[str, Array]:
            nonlocal warnings
            condition, warnings = condition_of(engine, self.bundle, subjects, features)
            condition = replace(condition, first_output=first)
            noise = SeedNoise([picture.seed for picture in pictures])
            kept = known(len(pictures)) if known else None
            state = sampler.sample(engine, manifest.model, settings, condition, noise, on_step, kept)
            return {"images": self._decode(engine, state), "latents": state}

        if save_levels or on_level:  # the states are read on the way
            arrays = {name: self.engine.get(array).copy() for name, array in make(self.engine).items()}
        else:
            texts = {text for one in subjects if one.label is None for text in (one.name, one.negative)}
            shapes = (len(pictures), len(texts), known is not None, first is not None)
            key = (batch_key(manifest, settings), *shapes)
            arrays = run_generation(self.engine, key, make)
        images, latents = arrays["images"], arrays["latents"]
        if not np.isfinite(latents).all():
            used = ", ".join(f"{option(name)} {value}" for name, value in settings.items())
            raise NotFinite(
                f"the latents are not finite with {used}; try less --guidance, or far verify to see where it begins"
            )
        made = Generation(images, latents, pictures, warnings=(*cut, *warnings))
        if on_level:
            on_level(last, images)
        if not save_levels:
            return made
        seen = seen or [self.decode(view) for view in sampler.preview_latents(manifest.model, settings, samples)[:-1]]
        return replace(made, level_latents=np.stack(samples, axis=1), level_images=np.stack([*seen, images], axis=1))

    def _pictures(
        self,
        subjects: Sequence[Subject],
        seeds: Sequence[int],
        settings: Sequence[Mapping[str, Any]],
        batch_size: int,
        edited: dict[str, str] | None = None,
    ) -> tuple[PictureMetadata, ...]:
        """The record of every picture."""
        count, surroundings = len(subjects), self.surroundings()
        return tuple(
            PictureMetadata(
                label=subject.label,
                name=subject.name,
                negative=subject.negative,
                seed=seed,
                sampling=dict(settings[i]),
                batch=min(batch_size, count - i // batch_size * batch_size),
                index=i % batch_size,
                edited=edited or {},
                **surroundings,
            )
            for i, (subject, seed) in enumerate(zip(subjects, seeds, strict=True))
        )
