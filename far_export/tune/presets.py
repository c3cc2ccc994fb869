"""Tuned presets: as the manifest has them, written into a bundle, and as a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from far_export.tune.run import TuneResult
from far_runtime.bundle import Bundle, open_bundle, write_manifest
from far_runtime.errors import FarError
from far_runtime.sampling.presets import LIMITS
from far_runtime.sampling.schedule import compact
from far_runtime.storage.atomic import check_folder, whole_file


def presets_of(result: TuneResult, record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The presets by name as the manifest has them: {"settings", "measured"}.

    record: how they were measured (engine, count, seed, version); becomes a part of "measured".
    """
    presets = {}
    for name, preset in result.chosen.items():
        first, second = preset.candidate, preset.confirmation
        measured = {
            "ratio": preset.ratio, "image": [first.image, second.image], "latents": [first.latents, second.latents],
            "flops": first.flops, "official_flops": result.official_flops, **record,
        }  # fmt: skip
        settings = {**first.settings, "steps": compact(first.settings["steps"])}
        presets[name] = {"settings": settings, "measured": measured}
    return presets


def check_writable(bundle: Bundle) -> None:
    """FarError, before long work, where presets cannot be put into a bundle."""
    try:
        check_folder(bundle.path)
    except FarError:
        raise FarError(
            f"{bundle.path}: cannot be written, so it takes no presets; tune a copy that can be, or use --dry-run with "
            "--save FILE"
        ) from None


def write_presets(bundle: Bundle, presets: Mapping[str, dict[str, Any]]) -> None:
    """Put presets into a bundle's manifest, all or none; its other presets stay. FarError where that fails."""
    try:
        current = open_bundle(bundle.path, check=False).manifest
        write_manifest(bundle.path, replace(current, presets={**current.presets, **presets}))
    except FarError as error:
        raise FarError(f"{error}; or tune a copy of the bundle, or keep the presets with --save FILE") from error


def save_presets(path: Path, presets: Mapping[str, dict[str, Any]]) -> None:
    """Presets as a file that `far export --presets` reads."""
    with whole_file(path) as aside:
        aside.write_text(json.dumps(presets, indent=1) + "\n", encoding="utf-8")


def read_presets(path: Path, known: tuple[str, ...] = tuple(LIMITS)) -> dict[str, dict[str, Any]]:
    """Presets from a file that `save_presets` wrote; FarError for any other file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        presets = {
            name: {"settings": dict(entry["settings"]), "measured": dict(entry["measured"])}
            for name, entry in data.items()
        }
        if unknown := [name for name in presets if name not in known]:
            raise ValueError(f"unknown preset {unknown[0]!r}")
        for entry in presets.values():
            float(entry["measured"]["ratio"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FarError(
            f"{path}: no file of presets ({error}); make one with: far tune BUNDLE --save presets.json"
        ) from error
    return presets
