"""A bundle's own sampling settings, and the plan that they make with some of them changed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from far_runtime.bundle import Bundle, Manifest
from far_runtime.errors import FarError
from far_runtime.sampling.base import Sampler, Step
from far_runtime.sampling.presets import OF_THE_BUNDLE, preset_of
from far_runtime.sampling.systems import SAMPLERS


def sampler_of(manifest: Manifest) -> Sampler:
    """The sampling loop of the bundle's system; KeyError where `check_system` would raise."""
    return SAMPLERS[manifest.system]


def resolve_settings(manifest: Manifest, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All sampling settings by name: the given ones (None: not given), else those of the preset that is given by that
    name, else the manifest's, else the official code's.

    FarError for settings that the system does not have or that cannot be, and where a step has no graph.
    """
    chosen = {name: value for name, value in (given or {}).items() if value is not None}
    preset = chosen.pop("preset", None)
    defaults = manifest.default_settings if preset is None else preset_of(manifest, preset).settings
    own = defaults.get("steps")
    steps = ",".join(map(str, own)) if isinstance(own, list) else str(own)
    for name in OF_THE_BUNDLE:
        if name in chosen and "steps" not in chosen and "," in steps:
            of = "the bundle's default" if preset is None else f"preset {preset}"
            raise FarError(f"{option(name)}: {of} has steps {steps}, for its own {name}; give --steps beside it")
    settings = resolve_system_settings(manifest.system, manifest.model, chosen, defaults)
    for step in plan_of(manifest, settings):
        for call in step.calls:
            manifest.graph(call.stage, call.constants)
    return settings


def resolve_system_settings(
    system: str, model: Mapping[str, Any], given: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """All settings of a system: the given ones, else the defaults, else the official code's; FarError for settings that
    it does not have or that cannot be."""
    sampler = SAMPLERS[system]
    check_setting_names(system, sampler.SETTINGS, given)
    try:
        return sampler.resolve_settings(model, {**(defaults or {}), **given})
    except (TypeError, ValueError, OverflowError) as error:
        raise FarError(
            f"sampling settings {dict(given)}: {error}; give numbers, as far generate --help shows"
        ) from error


def plan_of(manifest: Manifest, settings: Mapping[str, Any]) -> tuple[Step, ...]:
    """The steps of the loop under resolved settings."""
    return sampler_of(manifest).plan(manifest.model, settings)


def batch_key(manifest: Manifest, settings: Mapping[str, Any]) -> str:
    """What settings have in common with others under which a loop runs the same stages on arrays of the same shapes:
    everything but how much its guided steps are guided. Pictures of one kind can be drawn in one batch."""
    guided = [step.guidance != 1 for step in plan_of(manifest, settings)]
    return json.dumps({**settings, "guidance": [bool(settings["guidance"]), *guided]}, sort_keys=True)


def merge_guidance(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of a batch from those of its pictures, which differ in guidance at most: that is a tuple then."""
    scales = tuple(one["guidance"] for one in settings)
    return {**settings[0], "guidance": scales[0] if len(set(scales)) == 1 else scales}


def without_guidance(manifest: Manifest, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settled settings with the guidance that leaves every step without its unconditional half."""
    for none in (1.0, 0.0):  # systems count from either
        changed = {**settings, "guidance": none}
        if all(step.guidance == 1 for step in plan_of(manifest, changed)):
            return changed
    return dict(settings)


def check_setting_names(system: str, options: tuple[str, ...], given: Mapping[str, Any]) -> None:
    """FarError for a setting that the system does not take."""
    unknown = [name for name in given if name not in options]
    if unknown:
        raise FarError(
            f"{', '.join(option(name) for name in unknown)}: a {system} model has no such setting; it takes "
            f"{', '.join(option(name) for name in options)}"
        )


def option(name: str) -> str:
    """A setting's name on the command line."""
    return "--" + name.replace("_", "-")


def check_system(bundle: Bundle) -> None:
    """FarError for a bundle of a system that has no sampling loop here."""
    if bundle.manifest.system not in SAMPLERS:
        raise FarError(
            f"{bundle.path}: system {bundle.manifest.system!r}; this far-deploy draws from {', '.join(SAMPLERS)}; "
            "update it with: pip install -U far-deploy"
        )
