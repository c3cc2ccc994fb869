"""The reference of a verification: the checkpoint's own torch modules, with the tolerances of the exporter."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from far_export.load import text_part
from far_export.stages import SYSTEMS
from far_export.stages.stage import Stage
from far_export.tolerances import stage_tolerance
from far_models.checkpoint.load import Checkpoint
from far_runtime.bundle import Manifest
from far_runtime.errors import FarError


def reference_stages(manifest: Manifest, model: nn.Module, vae: nn.Module, text: Stage | None = None) -> list[Stage]:
    """The torch stages of a checkpoint, each for all levels, even where the bundle has one graph per level.

    text: the text encoder's stage, for subjects with prompts.
    """
    stages = SYSTEMS[manifest.system].stages(model, vae, manifest.model, None)
    return [*stages, *([] if text is None else [text])]


def exporter_tolerances(stages: Sequence[Stage], manifest: Manifest) -> dict[str, float]:
    """The tolerance that the exporter gives every stage at the precision of the bundle's graphs, by the stage's name;
    the smallest where several modules share a name."""
    precisions = {graph.stage: graph.precision for graph in manifest.graphs}
    tolerances: dict[str, float] = {}
    for stage in stages:
        tolerance = stage_tolerance(stage, precisions.get(stage.stage, "fp32"))
        tolerances[stage.stage] = min(tolerance, tolerances.get(stage.stage, math.inf))
    return tolerances


def check_sizes(manifest: Manifest, model: nn.Module, vae: nn.Module) -> None:
    """Raise FarError, naming what differs, unless model and VAE have the sizes and settings of the manifest."""
    actual, recorded = (
        _flatten(json.loads(json.dumps(info.to_json())))  # lists in place of tuples, as in the manifest's file
        for info in (SYSTEMS[manifest.system].info(model, vae), manifest.model)
    )
    different = [
        f"{name} is {actual.get(name)}, the bundle has {value}"
        for name, value in recorded.items()
        if name in actual and actual[name] != value
    ]
    if different:
        raise FarError(
            f"not the checkpoint or VAE that the bundle was exported from: {'; '.join(different)}; "
            "give --checkpoint, --vae and --config as they were at the export"
        )


def reference_text(manifest: Manifest, model: Checkpoint, folder: Path | None) -> Stage | None:
    """The torch stage of the bundle's text encoder in `folder`; None for a bundle without one.

    Raises FarError where the folder is not given, and where it holds another text encoder.
    """
    if folder is None and manifest.has_stage("text"):
        name = manifest.source.get("text_encoder", {}).get("folder", "DIR")
        raise FarError(f"the bundle has a text encoder; give the folder that it came from: --text-encoder {name}")
    part = text_part(model, manifest.model, folder)
    if part is None:
        return None
    if part.settings != getattr(manifest.model, "text", None):
        raise FarError(f"{folder}: not the text encoder that the bundle was exported with; its tokens are others")
    return part.stage


def recorded_vae(manifest: Manifest, checkpoint: Path) -> Path:
    """The VAE file that the manifest names, in the checkpoint's folder; FarError where it is not there."""
    name = manifest.source.get("vae", {}).get("file")
    if not name:
        raise FarError("the bundle does not say which VAE it was exported with; give it with --vae")
    path = checkpoint.parent / Path(name).name
    if not path.is_file():
        raise FarError(f"{path}: no such file; give the VAE that the bundle was exported with: --vae {Path(name).name}")
    return path


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
