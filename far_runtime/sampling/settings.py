"""A bundle's own sampling settings, and the plan that they make with some of them changed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from far_runtime.bundle import Bundle, Manifest
from far_runtime.errors import FarError, SettingName, join_texts
from far_runtime.model_info import ModelInfo
from far_runtime.sampling.base import Plan, Sampler
from far_runtime.sampling.options import settings_of
from far_runtime.sampling.presets import preset_of
from far_runtime.sampling.schedule import comma_separated
from far_runtime.sampling.systems import SAMPLERS


def sampler_of(manifest: Manifest) -> Sampler[Any]:
    """The sampling loop of the bundle's system; KeyError where `check_system` would raise."""
    return SAMPLERS[manifest.system]


def resolve_settings(manifest: Manifest, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All sampling settings by name: the given ones (None: not given), else those of the preset that is given by that
    name, else the manifest's, else the official code's.

    FarError for settings that the system does not have or that cannot be, and where a step has no graph.
    """
    return resolve_plan(manifest, given)[0]


def resolve_plan(
    manifest: Manifest, given: Mapping[str, Any] | None = None, kept: int = 0
) -> tuple[dict[str, Any], Plan]:
    """All sampling settings, as `resolve_settings` returns them, and the plan that they make for pictures of which an
    edit keeps so many cells. Raises as `resolve_settings` does."""
    chosen = {name: value for name, value in (given or {}).items() if value is not None}
    preset = chosen.pop("preset", None)
    defaults = manifest.default_settings if preset is None else preset_of(manifest, preset).settings
    steps = comma_separated(defaults.get("steps", ""))
    for name in ("levels", "iterations"):
        if name in chosen and "steps" not in chosen and "," in steps:
            of = "the bundle's default" if preset is None else f"preset {preset}"
            raise FarError(
                SettingName(name), f": {of} has steps {steps}, for its own {name}; give ", SettingName("steps"),
                " beside it",
            )  # fmt: skip
    settings = resolve_system_settings(manifest.system, manifest.model, chosen, defaults)
    plan = plan_of(manifest, settings, kept)
    for step in plan:
        for call in step.calls:
            manifest.graph(call.stage, call.constants)
    return settings, plan


def resolve_system_settings(
    system: str, model: ModelInfo, given: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """All settings of a system: the given ones, else the defaults, else the official code's; FarError for settings that
    it does not have or that cannot be."""
    check_setting_names(system, given)
    try:
        return SAMPLERS[system].resolve_settings(model, {**(defaults or {}), **given})
    except (TypeError, ValueError, OverflowError) as error:
        raise FarError(
            f"sampling settings {dict(given)}: {error}; give numbers, as far generate --help shows"
        ) from error


def plan_of(manifest: Manifest, settings: Mapping[str, Any], kept: int = 0) -> Plan:
    """The steps of the loop under resolved settings, for pictures of which an edit keeps so many cells."""
    return sampler_of(manifest).plan(manifest.model, settings, kept)


def batch_key(settings: Mapping[str, Any], plan: Plan) -> str:
    """Equal for pictures that can be drawn in one batch: those under whose settings a loop runs the same stages on
    arrays of the same shapes. How much their guided steps are guided may differ."""
    rows = [call.rows for step in plan for call in step.calls]
    return json.dumps({**settings, "guidance": rows}, sort_keys=True)


def without_guidance(manifest: Manifest, settings: Mapping[str, Any], kept: int = 0) -> tuple[dict[str, Any], Plan]:
    """Resolved settings with the guidance that leaves every step without its unconditional half, and their plan."""
    for none in (1.0, 0.0):  # systems count from either
        changed = {**settings, "guidance": none}
        plan = plan_of(manifest, changed, kept)
        if all(step.guidance == 1 for step in plan):
            return changed, plan
    return dict(settings), plan_of(manifest, settings, kept)


def check_setting_names(system: str, given: Iterable[str]) -> None:
    """FarError for a setting that the system does not take."""
    known = [SettingName(name) for name in settings_of(system)]
    unknown = [SettingName(name) for name in given if name not in known]
    if unknown:
        raise FarError(
            join_texts(unknown, ", "), f": a {system} model has no such setting; it takes ", join_texts(known, ", ")
        )


def check_system(bundle: Bundle) -> None:
    """FarError for a bundle of a system that has no sampling loop here."""
    if bundle.manifest.system not in SAMPLERS:
        raise FarError(
            f"{bundle.path}: system {bundle.manifest.system!r}; this far-deploy draws from {', '.join(SAMPLERS)}; "
            "update it with: pip install -U far-deploy"
        )
