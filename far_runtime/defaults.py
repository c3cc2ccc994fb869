"""A bundle's own settings, and the schedule that they make with some of them changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from far_runtime.bundle import Bundle, Manifest
from far_runtime.errors import FarError
from far_runtime.samplers import SAMPLERS
from far_runtime.samplers.far import Step
from far_runtime.schedule import OFFICIAL_STEPS, Schedule, make_schedule, official_levels

OFFICIAL_GUIDANCE, OFFICIAL_TEMPERATURE = 3.0, 1.0


@dataclass(frozen=True)
class Settings:
    """Sampling settings of one call. steps: as `make_schedule` takes them."""

    guidance: float
    temperature: float
    steps: str | int | Sequence[int]
    levels: tuple[int, ...]


def settings_of(
    manifest: Manifest,
    guidance: float | None = None,
    temperature: float | None = None,
    steps: str | int | Sequence[int] | None = None,
    levels: Sequence[int] | None = None,
) -> Settings:
    """The given settings; what is None as the manifest has it, or else as the official code does."""
    default, model = manifest.schedule, manifest.model
    if levels is None:
        levels = default.get("levels") or official_levels(model["grid"], model["masked"])
    return Settings(
        float(default.get("guidance", OFFICIAL_GUIDANCE) if guidance is None else guidance),
        float(default.get("temperature", OFFICIAL_TEMPERATURE) if temperature is None else temperature),
        default.get("steps", OFFICIAL_STEPS) if steps is None else steps,
        tuple(int(level) for level in levels),
    )


def schedule_of(manifest: Manifest, settings: Settings) -> Schedule:
    """The schedule of these settings; FarError for settings that cannot be, or that no graph was exported for."""
    schedule = make_schedule(
        settings.levels,
        grid=manifest.model["grid"],
        masked=manifest.model["masked"],
        guidance=settings.guidance,
        temperature=settings.temperature,
        steps=settings.steps,
    )
    for step in plan_of(manifest, schedule):
        manifest.graph("transformer", step.constants)
    return schedule


def plan_of(manifest: Manifest, schedule: Schedule) -> tuple[Step, ...]:
    """The steps of the loop under a schedule."""
    plan: tuple[Step, ...] = SAMPLERS[manifest.system].plan(schedule, manifest.model["grid"], manifest.model["masked"])
    return plan


def check_system(bundle: Bundle) -> None:
    """FarError for a bundle of a system that has no sampling loop here."""
    if bundle.manifest.system not in SAMPLERS:
        raise FarError(
            f"{bundle.path}: system {bundle.manifest.system!r}; this far-deploy draws from {', '.join(SAMPLERS)}; "
            "update it with: pip install -U far-deploy"
        )
