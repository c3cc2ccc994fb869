"""A checkpoint and its VAE into a bundle: load, declare the stages, write the graphs, quantise, verify, and put the
folder in place."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from far_export.bundle_folder import check_replaceable, check_target
from far_export.cast import CAST_DTYPES, cast_stages
from far_export.load import check_weights, load_pair, text_part
from far_export.onnx.check import check_graphs, reference_outputs
from far_export.onnx.writer import export_stages
from far_export.options import ExportOptions
from far_export.stages import SYSTEMS
from far_export.stages.stage import Stage
from far_export.verify.acceptance import check_pictures
from far_models.checkpoint.load import Checkpoint
from far_runtime import __version__
from far_runtime.bundle import Bundle, Manifest, open_bundle, record_of, write_manifest
from far_runtime.errors import FarError, SettingName
from far_runtime.model_info import ModelInfo
from far_runtime.sampling.settings import resolve_system_settings
from far_runtime.storage.atomic import whole_folder

if TYPE_CHECKING:
    from far_export.stages.text import TextPart


@dataclass(frozen=True)
class Networks:
    """The loaded networks of a bundle."""

    model: Checkpoint
    """The generator."""

    vae: Checkpoint
    text: TextPart | None
    """The text encoder, None where there is none."""

    info: ModelInfo
    """The manifest's `model`."""

    @property
    def text_stage(self) -> Stage | None:
        """The text encoder's stage, where there is one."""
        return None if self.text is None else self.text.stage


def export_bundle(checkpoint: str | Path, vae: str | Path, output: str | Path, **options: Any) -> Bundle:
    """Export a checkpoint and its VAE as a bundle of ONNX stages in the folder `output`.

    The options are the fields of `ExportOptions`. The folder appears whole or not at all; an older bundle in its place
    stays until the new one is complete. A bundle below FP32 is verified at the end: by a picture that is drawn with it
    and with the float32 torch modules. Raises FarError for bad input, and CheckFailed where an exported graph does not
    compute what the torch module computes.
    """
    export, target = ExportOptions(**options), Path(output)
    check_target(target)
    export.check()
    networks = load(checkpoint, vae, export)
    manifest, stages = declare(networks, export)
    if networks.text is None and networks.info.takes_text:
        export.report("no text encoder: the bundle will draw without prompts only; give --text-encoder DIR for prompts")
    with whole_folder(target, check_replaceable=check_replaceable) as folder:
        cases = reference_outputs(stages)
        stages = cast_stages(stages, export.precision) if export.precision in CAST_DTYPES else stages
        manifest = write(folder, manifest, stages, networks, export)
        fp16_stages = stages if export.precision == "fp16" else []
        del stages, networks  # the checks load the weights a second time: let the first copy go
        export.report(check_graphs(Bundle(folder, manifest), cases))
        if export.precision == "int8":
            quantize(folder, manifest, export)
        if export.precision != "fp32":
            accept(folder, load(checkpoint, vae, export), fp16_stages, export)
    return open_bundle(target, check=False)


def load(checkpoint: str | Path, vae: str | Path, options: ExportOptions) -> Networks:
    """The networks in float32; FarError where they do not fit each other."""
    model, decoder = load_pair(checkpoint, vae, options.weights, options.overrides)
    check_weights(model, options.weights)
    info = SYSTEMS[model.system].info(model.model, decoder.model)
    text = text_part(model, info, options.text_encoder)
    return Networks(model, decoder, text, info if text is None else replace(info, text=text.settings))  # type: ignore[call-arg]


def declare(networks: Networks, options: ExportOptions) -> tuple[Manifest, list[Stage]]:
    """The manifest, as far as it is known before anything is written, and the stages; FarError for settings, presets
    or class names that the model does not take."""
    model, vae, info = networks.model, networks.vae, networks.info
    system = SYSTEMS[model.system]
    defaults = {**model.sampling, **(options.defaults or {})}
    settings = _check_settings(system.name, info, defaults, options)
    classes = tuple(options.classes) or model.classes
    if classes and len(classes) != info.classes:
        raise FarError(
            f"{len(classes)} class names for a model with {info.classes} classes; use ",
            SettingName("classes"),
            " with one name for each class",
        )
    if options.levels == "per-level" and "levels" not in settings:
        raise FarError(
            SettingName("levels"),
            f" per-level: a {system.name} model has no levels; leave ",
            SettingName("levels"),
            " out",
        )
    stages = system.stages(model.model, vae.model, info, settings if options.levels == "per-level" else None)
    if options.editing:
        stages += system.editing(model.model, vae.model, info)
    source: dict[str, Any] = {"checkpoint": model.source, "vae": vae.source, "config": dict(options.overrides or {})}
    if networks.text is not None:
        source["text_encoder"] = dict(networks.text.source)
    manifest = Manifest(
        system=system.name,
        model=info,
        default_settings={**settings, **defaults},
        graphs=(),
        files={},
        classes=classes,
        source=source,
        created_by=f"far-deploy {__version__}",
        precision="fp32" if options.precision == "int8" else options.precision,
        presets=dict(options.presets or {}),
    )
    return manifest, stages if networks.text_stage is None else [*stages, networks.text_stage]


def _check_settings(
    system: str, info: ModelInfo, defaults: Mapping[str, Any], options: ExportOptions
) -> dict[str, Any]:
    """The bundle's default settings, resolved; FarError for these, the presets' or --verify-steps that do not fit."""
    settings = resolve_system_settings(system, info, defaults)
    if options.verify_steps is not None:
        resolve_system_settings(system, info, {**defaults, "steps": options.verify_steps})
    for preset in (options.presets or {}).values():
        resolve_system_settings(system, info, preset["settings"])
    return settings


def write(
    folder: Path, manifest: Manifest, stages: Sequence[Stage], networks: Networks, options: ExportOptions
) -> Manifest:
    """Write graphs, weights, the tokenizer and the manifest; returns the complete manifest."""
    graphs = export_stages(stages, folder, options.report)
    for name, path in ({} if networks.text is None else networks.text.files).items():
        shutil.copyfile(path, folder / name)
    files = {path.name: record_of(path) for path in sorted(folder.iterdir())}
    manifest = replace(manifest, graphs=graphs, files=files)
    write_manifest(folder, manifest)
    return manifest


def quantize(folder: Path, manifest: Manifest, options: ExportOptions) -> None:
    """Quantise the FP32 bundle in `folder` to int8 in place."""
    from far_export.onnx.quantize import quantize_bundle

    write_manifest(folder, quantize_bundle(folder, manifest, options.calibration_pictures, options.report))


def accept(folder: Path, networks: Networks, fp16_stages: Sequence[Stage], options: ExportOptions) -> None:
    """CheckFailed where a picture of the bundle in `folder` differs from the float32 networks' by more than its
    precision may cost.

    fp16_stages: the stages as they were cast and exported, for FP16 alone.
    """
    check_pictures(
        open_bundle(folder, check=False), networks.model, networks.vae, networks.text_stage,
        fp16_stages, options.verify_steps, options.report,
    )  # fmt: skip
