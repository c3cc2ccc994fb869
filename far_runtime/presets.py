"""Named sampling settings of a bundle, from the released code's own to the fastest: those that `far tune` found, or
ones that are known to do for other models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from far_runtime.bundle import Manifest
from far_runtime.errors import FarError
from far_runtime.samplers import SAMPLERS

OFFICIAL = "official"
PRESETS = (OFFICIAL, "quality", "balanced", "fast")
LIMITS = {"quality": 1.05, "balanced": 1.1, "fast": 1.5}
"""How far from the official pictures' distribution a tuned preset may be: its distance to them, in units of the
distance of two official sets of other seeds."""

FEW_STEPS: dict[str, dict[str, Any]] = {
    "quality": {"solver": "dpmpp-2m", "steps": 8},
    "balanced": {"solver": "dpmpp-2m", "steps": 5},
    "fast": {"solver": "dpmpp-2m", "steps": 3},
}
"""Diffusion settings where a bundle was not tuned."""

OF_THE_MODEL = ("guidance", "guidance_schedule", "temperature", "top_k", "top_p", "more_smooth")
"""Settings that no preset changes."""


@dataclass(frozen=True)
class Preset:
    """Settings by name. measured: what `far tune` found of them (empty: they were not tuned for this bundle)."""

    name: str
    settings: dict[str, Any]
    measured: Mapping[str, Any] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """What is to be said of it."""
        if self.name == OFFICIAL:
            return "preset official: the released code's schedule"
        if not self.measured:
            return f"preset {self.name}: not tuned for this bundle; far tune BUNDLE finds its own"
        return f"preset {self.name}: tuned, distance {self.measured['ratio']:.2f} (limit {LIMITS[self.name]:g})"


def preset_names(manifest: Manifest) -> tuple[str, ...]:
    """The presets that a bundle has."""
    return PRESETS if "steps" in SAMPLERS[manifest.system].OPTIONS else (OFFICIAL,)


def preset_of(manifest: Manifest, name: str) -> Preset:
    """A preset of a bundle; FarError for one that it does not have."""
    if name not in preset_names(manifest):
        raise FarError(
            f"--preset {name}: a {manifest.system} bundle has {', '.join(preset_names(manifest))}; use one of these"
        )
    if name in manifest.presets:
        tuned = manifest.presets[name]
        return Preset(name, dict(tuned["settings"]), dict(tuned["measured"]))
    kept = {key: value for key, value in manifest.schedule.items() if key in OF_THE_MODEL}
    few = {} if name == OFFICIAL else FEW_STEPS[name]
    return Preset(name, SAMPLERS[manifest.system].settle(manifest.model, {**kept, **few}))
