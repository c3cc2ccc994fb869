"""FAR-T2I's sampling loop: FAR's masked loop with another level list, guidance and temperatures (sample_tokens in the
official models/far_t2i.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from far_runtime.model_info import FarT2iInfo
from far_runtime.sampling import far
from far_runtime.sampling.base import Plan
from far_runtime.sampling.far import PRESETS as PRESETS
from far_runtime.sampling.far import first as first
from far_runtime.sampling.far import preview_latents as preview_latents
from far_runtime.sampling.far import sample as sample
from far_runtime.sampling.options import resolve_values
from far_runtime.sampling.schedule import OFFICIAL_GRID, Schedule, floored, make_schedule

OFFICIAL_LEVELS = (0, 2, 3, 4, 5, 6, 7, 8, 10, 13)


def resolve_settings(model: FarT2iInfo, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """FAR's settings, with a guidance that is the same at every level."""
    official = OFFICIAL_LEVELS if model.grid == OFFICIAL_GRID else range(model.grid)
    # Levels always rise here, as those of the unmasked FAR do.
    return far.resolve_level_settings(resolve_values("far_t2i", model, overrides), official, model.grid, masked=False)


def schedule_of(settings: Mapping[str, Any]) -> Schedule:
    """The schedule of resolved settings: constant guidance, and the temperatures of the unmasked FAR."""
    schedule = make_schedule(settings, masked=False)
    guidance = floored(float(settings["guidance"]), settings.get("guidance_floor", 1.0))
    return replace(schedule, guidance=(guidance,) * len(schedule))


def plan(model: FarT2iInfo, settings: Mapping[str, Any], kept: int = 0) -> Plan:
    """One step for every level of the list; `kept` changes nothing. Every sample but the last is low-passed."""
    return far.plan_of(model, schedule_of(settings), settings.get("shared_noise", 0), filter_first=True)
