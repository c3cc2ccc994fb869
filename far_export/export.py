"""Checkpoints into a bundle: load, declare the stages, write the graphs, check them by running, put the folder in
place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from far_export.graphs import SYSTEMS
from far_export.onnx_check import check_graphs, reference_outputs
from far_export.place import check_target, folder_put_in_place
from far_models.checkpoint import Checkpoint, load_checkpoint
from far_runtime import __version__
from far_runtime.bundle import Bundle, Manifest, open_bundle, record_of, write_manifest
from far_runtime.defaults import check_options
from far_runtime.errors import FarError
from far_runtime.samplers import SAMPLERS

LEVELS = ("auto", "shared", "per-level")

Report = Callable[[str], None]


def export_bundle(
    checkpoint: str | Path,
    vae: str | Path,
    output: str | Path,
    *,
    weights: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    levels: str = "auto",
    defaults: Mapping[str, Any] | None = None,
    classes: Sequence[str] = (),
    editing: bool = True,
    report: Report = lambda line: None,
) -> Bundle:
    """Export a checkpoint and its VAE as a bundle of ONNX stages in the folder `output`.

    levels: "shared" makes one transformer graph that takes the level as an input, "per-level" one graph per step of
    the default schedule with the level's constants folded in, "auto" what suits the system (shared for the unmasked
    FAR, per-level for the masked one). defaults: sampling settings of the bundle, in place of the checkpoint's own and
    the official ones. editing: with the stages that far edit needs. The folder appears whole or not at all; an older
    bundle in its place stays until the new one is complete. Raises FarError for bad input and CheckFailed where an
    exported graph does not compute what the torch module computes.
    """
    target = Path(output)
    check_target(target)
    model, decoder = load_pair(checkpoint, vae, weights, overrides)
    names = tuple(classes) or model.classes
    system = SYSTEMS[model.system]
    info = system.info(model.model, decoder.model)
    given = {**model.sampling, **(defaults or {})}
    check_options(system.name, SAMPLERS[system.name].OPTIONS, given)
    settings = SAMPLERS[system.name].settle(info, given)
    if names and len(names) != info["classes"]:
        raise FarError(
            f"{len(names)} class names for a model with {info['classes']} classes; use --classes with one name a class"
        )
    per_level = levels == "per-level" or (levels == "auto" and system.per_level(info))
    stages = system.stages(model.model, decoder.model, info, settings if per_level else None)
    if editing:
        stages += system.editing(model.model, decoder.model, info)
    source = {"checkpoint": model.source, "vae": decoder.source, "config": dict(overrides or {})}
    with folder_put_in_place(target) as folder:
        from far_export.onnx_export import export_stages

        graphs = export_stages(stages, folder, report)
        cases = reference_outputs(stages)
        del stages, model, decoder  # the check loads the weights a second time: let the first copy go
        files = {path.name: record_of(path) for path in sorted(folder.iterdir())}
        manifest = Manifest(
            system=system.name,
            model=info,
            schedule={**settings, **given},
            graphs=graphs,
            files=files,
            classes=names,
            source=source,
            created_by=f"far-deploy {__version__}",
        )
        write_manifest(folder, manifest)
        report(check_graphs(Bundle(folder, manifest), cases))
    return open_bundle(target, check=False)


def load_pair(
    checkpoint: str | Path, vae: str | Path, weights: str | None = None, overrides: Mapping[str, Any] | None = None
) -> tuple[Checkpoint, Checkpoint]:
    """A generator and the VAE whose latents it draws; FarError where the two do not fit each other. `weights` and
    `overrides` are the generator's."""
    model = load_checkpoint(checkpoint, weights, overrides)
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
