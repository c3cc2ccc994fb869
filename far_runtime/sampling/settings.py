"""The sampling settings of a bundle, with the user's in place of its defaults, and the plan that they make."""

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
    """The sampling loop of a bundle's system; KeyError where `check_system` raises."""
    return SAMPLERS[manifest.system]


def resolve_settings(manifest: Manifest, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All sampling settings of a bundle by name, as JSON values.

    A setting that is missing from `overrides`, or None there, has the value of the preset if `preset` is among them,
    else of the manifest, else of the released code. FarError for settings that the system does not take, for values
    that are out of range or do not fit each other, and where a step has no graph.
    """
    return resolve_plan(manifest, overrides)[0]


def resolve_plan(
    manifest: Manifest, overrides: Mapping[str, Any] | None = None, kept: int = 0
) -> tuple[dict[str, Any], Plan]:
    """The settings of `resolve_settings`, and the plan that they make.

    `kept`: cells of each picture that an edit keeps. FarError as `resolve_settings` raises it.
    """
    chosen = {name: value for name, value in (overrides or {}).items() if value is not None}
    preset = chosen.pop("preset", None)
    defaults = manifest.default_settings if preset is None else preset_of(manifest, preset).settings
    _check_steps_fit(chosen, defaults, "the bundle's default" if preset is None else f"preset {preset}")
    settings = resolve_system_settings(manifest.system, manifest.model, chosen, defaults)
    plan = plan_of(manifest, settings, kept)
    for step in plan:
        for call in step.calls:
            manifest.graph(call.stage, call.constants)
    return settings, plan


def _check_steps_fit(chosen: Mapping[str, Any], defaults: Mapping[str, Any], source: str) -> None:
    """FarError where levels or iterations are chosen, and the defaults have a number of steps for each of their own."""
    steps = comma_separated(defaults.get("steps", ""))
    for name in ("levels", "iterations"):
        if name in chosen and "steps" not in chosen and "," in steps:
            steps_name = SettingName("steps")
            raise FarError(
                SettingName(name), f": {source} has steps {steps}, for its own {name}; give ", steps_name, " beside it"
            )


def resolve_system_settings(
    system: str, model: ModelInfo, overrides: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """All settings of a system: the overrides, else the defaults, else the released code's values. FarError as
    `resolve_settings` raises it."""
    check_setting_names(system, overrides)
    try:
        return SAMPLERS[system].resolve_settings(model, {**(defaults or {}), **overrides})
    except (TypeError, ValueError, OverflowError) as error:
        raise FarError(
            f"sampling settings {dict(overrides)}: {error}; give numbers, as far generate --help shows"
        ) from error


def plan_of(manifest: Manifest, settings: Mapping[str, Any], kept: int = 0) -> Plan:
    """The steps of the loop under resolved settings. `kept`: cells of each picture that an edit keeps."""
    return sampler_of(manifest).plan(manifest.model, settings, kept)


def batch_key(settings: Mapping[str, Any], plan: Plan) -> str:
    """A key that is equal for pictures that can be drawn in one batch: the loop runs the same stages on arrays of the
    same shapes for them. The scale of guidance of their guided steps may differ."""
    rows = [call.rows for step in plan for call in step.calls]
    return json.dumps({**settings, "guidance": rows}, sort_keys=True)


def without_guidance(manifest: Manifest, settings: Mapping[str, Any], kept: int = 0) -> tuple[dict[str, Any], Plan]:
    """Resolved settings with a guidance that leaves every step without its unconditional half, and their plan."""
    for scale in (1.0, 0.0):  # VAR counts guidance from 0, the others from 1
        changed = {**settings, "guidance": scale}
        plan = plan_of(manifest, changed, kept)
        if all(step.guidance == 1 for step in plan):
            return changed, plan
    return dict(settings), plan_of(manifest, settings, kept)


def check_setting_names(system: str, overrides: Iterable[str]) -> None:
    """FarError for a setting that the system does not take."""
    known = [SettingName(name) for name in settings_of(system)]
    unknown = [SettingName(name) for name in overrides if name not in known]
    if unknown:
        raise FarError(
            join_texts(unknown, ", "), f": a {system} model has no such setting; it takes ", join_texts(known, ", ")
        )


def check_system(bundle: Bundle) -> None:
    """FarError for a bundle whose system has no sampling loop here."""
    if bundle.manifest.system not in SAMPLERS:
        raise FarError(
            f"{bundle.path}: system {bundle.manifest.system!r}; this far-deploy draws from {', '.join(SAMPLERS)}; "
            "update it with: pip install -U far-deploy"
        )
