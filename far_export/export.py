"""Checkpoints into a bundle: load, declare the stages, write the graphs, check them by running, put the folder in
place."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from far_export.bundle_folder import check_replaceable, check_target
from far_export.onnx.check import check_graphs, reference_outputs
from far_export.stages import SYSTEMS
from far_export.verify.acceptance import check_pictures, verifying_engine
from far_models.checkpoint.load import Checkpoint, load_checkpoint
from far_runtime import __version__
from far_runtime.bundle import (
    CALIBRATION_PICTURES,
    PRECISIONS,
    Bundle,
    Manifest,
    open_bundle,
    record_of,
    write_manifest,
)
from far_runtime.errors import FarError
from far_runtime.sampling.settings import resolve_system_settings
from far_runtime.storage.atomic import folder_put_in_place

if TYPE_CHECKING:
    from far_export.stages.text import TextPart

LEVELS = ("shared", "per-level")

Report = Callable[[str], None]


def export_bundle(
    checkpoint: str | Path,
    vae: str | Path,
    output: str | Path,
    *,
    weights: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    levels: str = "shared",
    defaults: Mapping[str, Any] | None = None,
    classes: Sequence[str] = (),
    editing: bool = True,
    text_encoder: str | Path | None = None,
    precision: str = "fp32",
    calibrate: int | None = None,
    verify_steps: str | None = None,
    presets: Mapping[str, dict[str, Any]] | None = None,
    report: Report = lambda line: None,
) -> Bundle:
    """Export a checkpoint and its VAE as a bundle of ONNX stages in the folder `output`.

    levels: "shared" makes one transformer graph that takes the level as an input, "per-level" one graph per step of
    the default schedule with the level's constants folded in. defaults: sampling settings of the bundle, in place of
    the checkpoint's own and the official ones. editing: with the stages that far edit needs. text_encoder: Hugging
    Face folder of the text encoder, for a text-to-image model. precision: of the matrix products and convolutions, one
    of PRECISIONS. calibrate: pictures that int8 is calibrated on (CALIBRATION_PICTURES unless given). A bundle below
    FP32 is verified at the end: a picture drawn by it and by the float32 torch modules; verify_steps: diffusion steps
    of that, in place of the bundle's own. presets: those that far tune found for these weights. The folder appears
    whole or not at all; an older bundle in its place stays until the new one is complete. Raises FarError for bad input
    and CheckFailed where an exported graph does not compute what the torch module computes.
    """
    target = Path(output)
    check_target(target)
    check_precision(precision, calibrate, verify_steps)
    model, decoder = load_pair(checkpoint, vae, weights, overrides)
    check_weights(model, weights)
    names = tuple(classes) or model.classes
    system = SYSTEMS[model.system]
    info = system.info(model.model, decoder.model)
    given = {**model.sampling, **(defaults or {})}
    settings = resolve_system_settings(system.name, info, given)
    if verify_steps is not None:
        resolve_system_settings(system.name, info, {**given, "steps": verify_steps})
    for preset in (presets or {}).values():
        resolve_system_settings(system.name, info, preset["settings"])
    if names and len(names) != info.get("classes", 0):
        raise FarError(
            f"{len(names)} class names for a model with {info.get('classes', 0)} classes; use --classes with one name "
            "a class"
        )
    if levels == "per-level" and "levels" not in settings:
        raise FarError(f"--levels per-level: a {system.name} model has no levels; leave --levels out")
    stages = system.stages(model.model, decoder.model, info, settings if levels == "per-level" else None)
    if editing:
        stages += system.editing(model.model, decoder.model, info)
    source = {"checkpoint": model.source, "vae": decoder.source, "config": dict(overrides or {})}
    part = text_part(model, info, text_encoder, report)
    if part is not None:
        stages.append(part.stage)
        info |= {"text": dict(part.settings)}
        source |= {"text_encoder": dict(part.source)}
    copies = {} if part is None else part.files
    with folder_put_in_place(target, check_replaceable) as folder:
        from far_export.cast import CASTS, cast_stages
        from far_export.onnx.writer import export_stages

        cases = reference_outputs(stages)
        stages = cast_stages(stages, precision) if precision in CASTS else stages
        graphs = export_stages(stages, folder, report)
        for name, path in copies.items():
            shutil.copyfile(path, folder / name)
        cast = stages if precision == "fp16" else []
        del stages, model, decoder, part  # the check loads the weights a second time: let the first copy go
        files = {path.name: record_of(path) for path in sorted(folder.iterdir())}
        manifest = Manifest(
            system=system.name,
            model=info,
            default_settings={**settings, **given},
            graphs=graphs,
            files=files,
            classes=names,
            source=source,
            created_by=f"far-deploy {__version__}",
            precision="fp32" if precision == "int8" else precision,
            presets=dict(presets or {}),
        )
        write_manifest(folder, manifest)
        report(check_graphs(Bundle(folder, manifest), cases))
        if precision == "int8":
            from far_export.onnx.quantize import quantize_bundle

            manifest = quantize_bundle(folder, manifest, calibrate or CALIBRATION_PICTURES, report)
            write_manifest(folder, manifest)
        if precision != "fp32":
            pair = load_pair(checkpoint, vae, weights, overrides)
            text = text_part(pair[0], info, text_encoder)
            stage = None if text is None else text.stage
            check_pictures(open_bundle(folder, check=False), *pair, stage, cast, verify_steps, report)
    return open_bundle(target, check=False)


def check_precision(precision: str, calibrate: int | None, verify_steps: str | None = None) -> None:
    """FarError for an unknown precision, for options of others, and where nothing is installed that can verify it."""
    if precision not in PRECISIONS:
        raise FarError(f"precision {precision!r}: unknown; known: {', '.join(PRECISIONS)}")
    if calibrate is not None and precision != "int8":
        raise FarError(f"--calibrate {calibrate}: only int8 is calibrated; leave it out, or add --precision int8")
    if precision == "fp32":
        if verify_steps is not None:
            raise FarError(f"--verify-steps {verify_steps}: an fp32 export draws no picture to verify; leave it out")
        return
    verifying_engine(precision)


def text_part(
    model: Checkpoint, info: Mapping[str, Any], text_encoder: str | Path | None, report: Report = lambda line: None
) -> TextPart | None:
    """The text encoder's part of a bundle, None without one; FarError for one that does not fit the model."""
    takes_text = info["condition"] == "text"
    if text_encoder is None:
        if takes_text:
            report("no text encoder: the bundle will draw without prompts only; give --text-encoder DIR for prompts")
        return None
    if not takes_text:
        raise FarError(f"--text-encoder {text_encoder}: a {model.system} model draws from class labels; leave it out")
    from far_export.stages.text import load_text_part

    return load_text_part(text_encoder, model.model.config)


def check_weights(model: Checkpoint, asked: str | None) -> None:
    """FarError where certain weights were asked for and the file has a single set without a name."""
    taken = model.source["weights"]
    if asked is not None and taken != asked:
        raise FarError(f"--weights {asked}: {model.source['file']} has a single set of weights; leave --weights out")


def load_pair(
    checkpoint: str | Path,
    vae: str | Path,
    weights: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    expect: str | None = None,
) -> tuple[Checkpoint, Checkpoint]:
    """A generator and the VAE whose latents it draws; FarError where the two do not fit each other. `weights` and
    `overrides` are the generator's, and so is `expect`, the system that it has to be of."""
    model = load_checkpoint(checkpoint, weights, overrides, expect)
    if model.system not in SYSTEMS:
        raise FarError(
            f"{checkpoint}: is a {model.system} checkpoint; expected {' or '.join(SYSTEMS)} (a VAE belongs after --vae)"
        )
    decoder = load_checkpoint(vae, expect=SYSTEMS[model.system].vae)
    ours, theirs = model.model.config.channels, decoder.model.config.channels
    if ours != theirs:
        raise FarError(
            f"{vae}: its latents have {theirs} channels, {checkpoint} draws latents of {ours}; give the VAE that "
            f"the model was trained with"
        )
    return model, decoder
