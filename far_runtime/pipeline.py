"""The pipeline: from labels or prompts and seeds to pictures, through a bundle's stages on one engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from far_runtime import __version__
from far_runtime.bundle import Bundle, open_bundle
from far_runtime.conditioning.cache import LIMIT, ConditionCache
from far_runtime.conditioning.subjects import Subject, condition_of, is_null, resolve_subjects, takes_text, texts_of
from far_runtime.engines import open_engine
from far_runtime.engines.base import Array, Engine, EngineOptions, run_generation
from far_runtime.engines.select import Choice
from far_runtime.errors import FarError, SettingName
from far_runtime.generation import (
    Generation,
    LevelRecorder,
    OnLevel,
    OnProgress,
    Watch,
    concatenate,
    progress_reporter,
)
from far_runtime.images.kept import KeptImage, kept_cells
from far_runtime.images.metadata import PictureMetadata
from far_runtime.planning import PlannedPicture, plan_batches, resolve_plans
from far_runtime.sampling.base import Plan, Step, merge_guidance
from far_runtime.sampling.latent_checks import check_finite, unsteady
from far_runtime.sampling.noise import SeedNoise
from far_runtime.sampling.settings import batch_key, check_system, sampler_of, without_guidance

DEFAULT_BATCH = 8


class Pipeline:
    """Draws pictures from a bundle.

    >>> with Pipeline.from_bundle("far-b") as pipeline:
    ...     images = pipeline.generate(["golden retriever", 3], seeds=[0, 0]).images
    """

    def __init__(self, bundle: Bundle, engine: Engine, threads: int | None = None, cache_bytes: int = LIMIT) -> None:
        """A pipeline over an open engine.

        threads: the number of threads that the engine was given, for the pictures' records.
        cache_bytes: bytes of memory for what depends on a label or prompt alone (`ConditionCache`); 0 for no cache.

        Raises FarError for a bundle of a system that has no sampling loop here.
        """
        check_system(bundle)
        self._sampler = sampler_of(bundle.manifest)
        self.bundle = bundle
        self.engine = engine
        self.threads = threads
        self._condition_cache = ConditionCache(engine, bundle, cache_bytes)

    @classmethod
    def from_bundle(
        cls,
        path: str | Path,
        engine: str | Choice | None = None,
        threads: int | None = None,
        check: bool = True,
        options: EngineOptions | None = None,
    ) -> Pipeline:
        """Open a bundle and an engine for it.

        engine: by name, or as `choose` chose it; None for the best one here.
        threads: short for options=EngineOptions(threads=...).
        check: whether the bundle's files are compared with their checksums.
        options: how the engine runs.

        Raises FarError for a bundle that is missing or damaged and for an engine that is not available.
        """
        if threads is not None and threads < 1:
            raise FarError(f"{threads} threads: expected 1 or more; use ", SettingName("threads"), " 2, say")
        options = replace(options or EngineOptions(), threads=threads or (options.threads if options else None))
        return cls.over(open_bundle(path, check), engine, options)

    @classmethod
    def over(cls, bundle: Bundle, engine: str | Choice | None = None, options: EngineOptions | None = None) -> Pipeline:
        """A pipeline over an open bundle; engine and options are those of `from_bundle`."""
        options = options or EngineOptions()
        return cls(bundle, open_engine(bundle, engine, options), options.threads)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the engine's memory."""
        self.engine.close()

    def surroundings(self) -> dict[str, Any]:
        """What the bits of a picture depend on beside its own settings, by the names of `PictureMetadata`."""
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
        """Draw one picture for each subject and seed.

        subjects: labels by number or name, or prompts, whichever the bundle draws from.
        seeds: one for each subject.
        negative: the prompt that guidance leads away from.
        batch_size: pictures that are computed together.
        on_progress, on_level, save_levels: as the fields of `Watch` say.
        sampling: the system's settings by name, such as guidance=2.5. What is None or absent is the bundle's default.
            guidance may be a sequence with a scale for each picture.

        A picture depends on its own subject, seed and settings alone, up to the engine's rounding. Raises FarError for
        subjects and settings that are invalid.
        """
        resolved = self._checked(subjects, seeds, negative, batch_size)
        plans = resolve_plans(self.bundle.manifest, sampling, len(resolved))
        batches = plan_batches(resolved, seeds, plans, batch_size, self.surroundings())
        return self._generate(batches, Watch(on_progress, on_level, save_levels))

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
        """Draw pictures that keep part of an image: its latents stay where every pixel of their cell is kept.

        The other arguments are those of `generate`.

        subjects: may be `null_subject`, which lets the image alone say what to draw. Guidance would then lead nowhere
            and is left out if all subjects are null.
        image: pixels uint8 [H, W, 3] of the bundle's size.
        keep: [H, W], True where the image stays as it is.
        edited: what the metadata says of the image, by name.

        All pixels are the decoder's; `compose` of far_runtime.images.edit puts those of the image back. Raises FarError
        as `generate` does, for a bundle without the encode stage, and where all of the image is kept.
        """
        resolved = self._checked(subjects, seeds, negative, batch_size)
        cells = kept_cells(self.bundle, image, keep)
        kept = int(cells.sum())
        plans = resolve_plans(self.bundle.manifest, sampling, len(resolved), kept)
        if all(is_null(self.bundle.manifest, subject) for subject in resolved):
            plans = [without_guidance(self.bundle.manifest, settings, kept) for settings, _ in plans]
        batches = plan_batches(resolved, seeds, plans, batch_size, self.surroundings(), edited)
        encoded = self.engine.run("encode", {"pixels": self.engine.put(image[None])})["latents"]
        source = KeptImage(self.engine.get(encoded).copy(), cells)
        return self._generate(batches, Watch(on_progress, on_level, save_levels), source)

    def like(
        self, picture: PictureMetadata, on_progress: OnProgress | None = None, save_levels: bool = False
    ) -> Generation:
        """Repeat a picture: in its place of a batch of the same size, whose other rows are copies of it.

        With the same bundle, engine and machine every bit is the same, with one exception: a step that was unguided for
        this picture and guided for others of its batch is the same up to rounding. `PictureMetadata.differences` tells
        what is not the same. Raises FarError for an edited picture, which does not hold the image that it came from.
        """
        if picture.edited:
            raise FarError("the picture was edited from another one; repeat it with far edit and the same files")
        batch = self.generate(
            [picture.subject] * picture.batch,
            [picture.seed] * picture.batch,
            batch_size=picture.batch,
            on_progress=on_progress,
            save_levels=save_levels,
            **picture.sampling,
        )
        return batch[picture.index : picture.index + 1]

    def subjects(self, subjects: Sequence[int | str | Subject], negative: str = "") -> list[Subject]:
        """The subjects of labels (numbers or names) or prompts, whichever the bundle draws from; subjects are checked.

        Raises FarError for a label that is out of range, unknown or ambiguous.
        """
        manifest = self.bundle.manifest
        resolved: list[Subject] = []
        for subject in subjects:
            if not isinstance(subject, Subject):
                labels, prompts = ([], [str(subject)]) if takes_text(manifest) else ([subject], [])
                resolved += resolve_subjects(manifest, labels, prompts, negative)
            elif is_null(manifest, subject):
                resolved.append(subject)
            elif subject.label is None:
                resolved += resolve_subjects(manifest, prompts=[subject.name], negative=subject.negative)
            else:
                resolved += resolve_subjects(manifest, [subject.label], negative=subject.negative)
        return resolved

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Pictures uint8 [B, H, W, 3] from the latents [B, L, C] that the loop ends with."""
        outputs = self.engine.run("decode", {"latents": self.engine.put(latents)})
        pixels: NDArray[np.uint8] = self.engine.get(outputs["pixels"])
        return pixels

    def _checked(
        self, subjects: Sequence[int | str | Subject], seeds: Sequence[int], negative: str, batch_size: int
    ) -> list[Subject]:
        """The subjects of a call; FarError for subjects, seeds or a batch size that are invalid."""
        resolved = self.subjects(subjects, negative)
        name, kind = ("prompt", "prompts") if takes_text(self.bundle.manifest) else ("label", "labels")
        if not resolved:
            raise FarError(f"no {kind}; give one or more with ", SettingName(name))
        if len(seeds) != len(resolved):
            raise FarError(f"{len(seeds)} seeds for {len(resolved)} {kind}; give one seed per picture")
        if batch_size < 1:
            raise FarError(
                f"batch size {batch_size}: expected 1 or more; use ",
                SettingName("batch_size"),
                f" {DEFAULT_BATCH}, say",
            )
        return resolved

    def _generate(
        self, batches: Sequence[Sequence[PlannedPicture]], watch: Watch, source: KeptImage | None = None
    ) -> Generation:
        """All pictures, batch by batch."""
        plan = batches[0][0].plan
        report = progress_reporter(plan, len(batches), watch.on_progress)
        generation = concatenate([self._batch(batch, report(i), watch, source) for i, batch in enumerate(batches)])
        warnings = (*generation.warnings, *unsteady(plan, generation.latents))
        return replace(generation, step_names=tuple(step.name for step in plan), warnings=warnings)

    def _batch(
        self,
        pictures: Sequence[PlannedPicture],
        report: Callable[[Step, int], None],
        watch: Watch,
        source: KeptImage | None,
    ) -> Generation:
        """The pictures of one batch."""
        plan = merge_guidance([picture.plan for picture in pictures])
        records = tuple(picture.metadata for picture in pictures)
        subjects = [record.subject for record in records]
        levels = self._level_recorder(plan, watch)
        features, cache_warnings = self._condition_cache.features(subjects)
        # The first step of an edit may see what is kept.
        first_output = None if source else self._condition_cache.first_output(plan[0], subjects, features)
        warnings: tuple[str, ...] = ()

        def on_step(step: Step, done: int, state: Array) -> None:
            if levels is not None and done == step.substeps:
                levels.add(self.engine.get(state).copy())
            report(step, done)

        def run(engine: Engine) -> dict[str, Array]:
            nonlocal warnings
            condition, warnings = condition_of(engine, self.bundle, subjects, features)
            condition = replace(condition, first_output=first_output)
            noise = SeedNoise([record.seed for record in records])
            kept = source.region(engine, len(records)) if source else None
            state = self._sampler.sample(engine, self.bundle.manifest.model, plan, condition, noise, on_step, kept)
            return {"images": engine.run("decode", {"latents": state})["pixels"], "latents": state}

        if levels is not None:
            # The states are read on the way, which no engine can capture.
            arrays = {name: self.engine.get(array).copy() for name, array in run(self.engine).items()}
        else:
            shapes = (len(records), len(texts_of(subjects)), source is not None, first_output is not None)
            arrays = run_generation(self.engine, (batch_key(records[0].sampling, plan), *shapes), run)
        images, latents = arrays["images"], arrays["latents"]
        check_finite(latents, [record.sampling for record in records])
        generation = Generation(images, latents, records, warnings=(*cache_warnings, *warnings))
        return generation if levels is None else levels.finish(generation, watch.save_levels)

    def _level_recorder(self, plan: Plan, watch: Watch) -> LevelRecorder | None:
        """What records the states of a batch, where somebody wants to see them."""
        if not watch.save_levels and watch.on_level is None:
            return None
        preview = partial(self._sampler.preview_latents, self.bundle.manifest.model, plan)
        return LevelRecorder(len(plan), preview, self.decode, watch.on_level)
