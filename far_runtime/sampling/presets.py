"""Named sampling settings of a bundle, from the released code's own to the fastest: those that `far tune` found, or
ones that are known to do for other models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from far_runtime.bundle import Manifest
from far_runtime.errors import FarError
from far_runtime.sampling.systems import SAMPLERS

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
"""Diffusion settings where a bundle was not tuned. A FAR's samples are low-passed and drawn anew at the next level, so
that all but the last may be coarse. On the zoo's model the ratios were 0.94, 0.95 and 1.03 (docs/performance.md); other
models may need more, which far tune finds."""

FEW_STEPS_OF_MAR: dict[str, dict[str, Any]] = {
    "quality": {"solver": "dpmpp-2m", "steps": "25:8", "guidance_floor": 1.1},
    "balanced": {"solver": "dpmpp-2m", "steps": "15:5", "guidance_floor": 1.2},
    "fast": {"solver": "dpmpp-2m", "steps": "8:3", "guidance_floor": 1.2},
}
"""The same for MAR, whose tokens are drawn once and stay: the more are known, the fewer steps the next ones need (DiSA,
arXiv 2505.20297). The first iterations, whose guidance is next to none, go unguided. On a small MAR (epsilon
prediction) balanced and fast had the ratios 1.02 and 1.41 to 50 steps (docs/performance.md)."""

OF_THE_MODEL = ("shared_noise", "guidance", "guidance_schedule", "temperature", "top_k", "top_p", "more_smooth")
"""Settings that no preset changes."""

OF_THE_BUNDLE = ("levels", "iterations")
"""Settings that only the official preset and a tuned one change: a bundle may have graphs for its own levels alone."""


@dataclass(frozen=True)
class Preset:
    """Settings by name, the official code's where one is missing. measured: what `far tune` found of them (empty: they
    were not tuned for this bundle)."""

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
    return PRESETS if "steps" in SAMPLERS[manifest.system].SETTINGS else (OFFICIAL,)


def preset_of(manifest: Manifest, name: str) -> Preset:
    """A preset of a bundle; FarError for one that it does not have."""
    if name not in preset_names(manifest):
        raise FarError(
            f"--preset {name}: a {manifest.system} bundle has {', '.join(preset_names(manifest))}; use one of these"
        )
    kept = {key: value for key, value in manifest.default_settings.items() if key in OF_THE_MODEL}
    if name in manifest.presets:
        tuned = manifest.presets[name]
        return Preset(name, {**kept, **tuned["settings"]}, dict(tuned["measured"]))
    if name == OFFICIAL:
        return Preset(name, kept)
    kept |= {key: value for key, value in manifest.default_settings.items() if key in OF_THE_BUNDLE}
    # Not settled: a range of steps fits any number of levels or iterations that is given beside it.
    return Preset(name, {**kept, **(FEW_STEPS_OF_MAR if manifest.system == "mar" else FEW_STEPS)[name]})
