"""Systems that can be exported: which stages a model has and what its manifest says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from far_export.graphs import far, vae
from far_export.stages import Stage
from far_runtime.samplers.far import plan
from far_runtime.schedule import OFFICIAL_STEPS, make_schedule, official_levels


@dataclass(frozen=True)
class Defaults:
    """What `far generate` does when it is not told otherwise; None leaves it to the checkpoint or the official code."""

    levels: tuple[int, ...] | None = None
    steps: str | None = None
    guidance: float | None = None
    temperature: float | None = None

    def settled(self, sampling: Mapping[str, Any]) -> dict[str, Any]:
        """These settings where given, else those of the checkpoint's `sampling`; what neither names is absent."""
        own = {name: value for name, value in asdict(self).items() if value is not None}
        return {**sampling, **own}


@dataclass(frozen=True)
class System:
    """One system's part of the exporter.

    stages(model, vae, schedule): its stages; with a schedule, the graphs that may have a step's constants folded in
    do. default_schedule(model, settings): the manifest's `schedule`, checked. model_info(model, vae): the manifest's
    `model`.
    """

    name: str
    stages: Callable[[nn.Module, nn.Module, Mapping[str, Any] | None], list[Stage]]
    default_schedule: Callable[[nn.Module, Mapping[str, Any]], dict[str, Any]]
    model_info: Callable[[nn.Module, nn.Module], dict[str, Any]]


def _far_stages(model: nn.Module, decoder: nn.Module, schedule: Mapping[str, Any] | None) -> list[Stage]:
    config = model.config
    steps = None
    if schedule is not None:
        made = make_schedule(schedule["levels"], grid=config.grid, masked=config.masked, steps=schedule["steps"])
        steps = plan(made, config.grid, config.masked)
    return [*far.stages(model, steps), vae.decode_stage(decoder, config.grid, config.latent_scale)]


def _far_schedule(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    config = model.config
    levels = tuple(given.get("levels") or official_levels(config.grid, config.masked))
    guidance, temperature = float(given.get("guidance", 3.0)), float(given.get("temperature", 1.0))
    steps = str(given.get("steps", OFFICIAL_STEPS))
    make_schedule(
        levels, grid=config.grid, masked=config.masked, guidance=guidance, temperature=temperature, steps=steps
    )
    return {"levels": list(levels), "steps": steps, "guidance": guidance, "temperature": temperature}


def _far_info(model: nn.Module, decoder: nn.Module) -> dict[str, Any]:
    config = model.config
    return {**asdict(config), "image_size": config.grid * decoder.config.stride, "vae": asdict(decoder.config)}


SYSTEMS = {"far": System("far", _far_stages, _far_schedule, _far_info)}
