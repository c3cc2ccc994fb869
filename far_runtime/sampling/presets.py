"""Presets: named sampling settings of a bundle, from the released code's to the fastest. `far tune` finds those of a
bundle; without it they are its system's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from far_runtime.bundle import Manifest
from far_runtime.errors import FarError, SettingName
from far_runtime.sampling.options import SETTINGS
from far_runtime.sampling.systems import SAMPLERS

OFFICIAL = "official"

LIMITS = {"quality": 1.05, "balanced": 1.1, "fast": 1.5}
"""The presets beside the official one, with the largest distance of their pictures to the official ones' distribution
that tuning accepts. The unit is the distance between two official sets of pictures with different seeds."""


@dataclass(frozen=True)
class Preset:
    """Sampling settings under a name."""

    name: str
    """OFFICIAL, or one of LIMITS."""
    settings: dict[str, Any]
    """Its settings by name; a missing one is the released code's."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    """What `far tune` measured, "ratio" and more; empty where the preset was not tuned for this bundle."""

    @property
    def line(self) -> str:
        """One line about it for the user."""
        if self.name == OFFICIAL:
            return "preset official: the released code's schedule"
        if not self.measured:
            return f"preset {self.name}: not tuned for this bundle; far tune BUNDLE finds its own"
        return f"preset {self.name}: tuned, distance {self.measured['ratio']:.2f} (limit {LIMITS[self.name]:g})"


def preset_names(manifest: Manifest) -> tuple[str, ...]:
    """The presets that a bundle has."""
    return (OFFICIAL, *SAMPLERS[manifest.system].PRESETS)


def preset_of(manifest: Manifest, name: str) -> Preset:
    """A preset of a bundle; FarError for one that it does not have."""
    if name not in preset_names(manifest):
        raise FarError(
            SettingName("preset"),
            f" {name}: a {manifest.system} bundle has {', '.join(preset_names(manifest))}; use one of these",
        )
    tuned, official = manifest.presets.get(name), name == OFFICIAL
    # An untuned preset leaves levels and iterations alone: the bundle may have graphs for its own levels only.
    unchanged = ("no preset",) if tuned or official else ("no preset", "tuned presets")
    own = {
        key: value
        for key, value in manifest.default_settings.items()
        if key in SETTINGS and SETTINGS[key].changed_by in unchanged
    }
    if tuned:
        return Preset(name, {**own, **tuned["settings"]}, dict(tuned["measured"]))
    # Not resolved: a range of steps fits any number of levels or iterations that is given beside it.
    return Preset(name, own if official else {**own, **SAMPLERS[manifest.system].PRESETS[name]})
