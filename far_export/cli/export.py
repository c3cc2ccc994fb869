"""`far export`: a checkpoint and its VAE as a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from far_runtime.bundle import CALIBRATION_PICTURES, PRECISIONS

FILE = click.Path(path_type=Path)


@click.command(short_help="Export a checkpoint and its VAE as a bundle of ONNX stages (needs torch).")
@click.argument("checkpoint", type=FILE)
@click.option("--vae", type=FILE, required=True, help="Checkpoint of the VAE that the model was trained with.")
@click.option(
    "-o",
    "--output",
    type=FILE,
    required=True,
    help="Folder of the bundle. An older bundle in it is replaced once the new one is complete.",
)
@click.option(
    "--weights",
    type=click.Choice(["model_ema", "model"]),
    help="Which weights of a .pth file to take. Default: model_ema, or model in a file without model_ema.",
)
@click.option(
    "--levels",
    type=click.Choice(["shared", "per-level"]),
    default="shared",
    show_default=True,
    help="shared: one transformer graph that takes the level as an input. per-level: a graph for each level, with the "
    "level's constants folded in, which takes more memory on a CPU.",
)
@click.option(
    "--config",
    "config",
    multiple=True,
    metavar="NAME=VALUE|FILE",
    help="A setting of the network that its weights do not show, like heads=12, or a JSON file of such settings; may "
    "be repeated.",
)
@click.option(
    "--classes", type=FILE, help="File of the class names: a JSON list, or a text file with one name on each line."
)
@click.option("--default-levels", metavar="0,2,3,...", help="Levels that the bundle draws by default.")
@click.option(
    "--default-steps", metavar="100|40:100|...", help="Diffusion steps of the levels that the bundle takes by default."
)
@click.option("--default-guidance", type=float, help="Guidance scale that the bundle takes by default.")
@click.option(
    "--default",
    "others",
    multiple=True,
    metavar="NAME=VALUE",
    help="Another sampling setting that the bundle takes by default, like iterations=32; may be repeated.",
)
@click.option(
    "--editing/--no-editing",
    default=True,
    show_default=True,
    help="Whether the bundle gets the stages that far edit needs.",
)
@click.option(
    "--text-encoder",
    type=FILE,
    metavar="DIR",
    help="Hugging Face folder of the text encoder that a text-to-image checkpoint was trained with.",
)
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="fp32",
    show_default=True,
    help="Precision of matrix products and convolutions; norms, softmax and the solver's state stay FP32.",
)
@click.option(
    "--calibrate",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Number of pictures that int8 is calibrated on. Default: {CALIBRATION_PICTURES}.",
)
@click.option(
    "--verify-steps",
    metavar="N|A:B|N,N,...",
    help="Diffusion steps of the picture by which a bundle below fp32 is verified at the end. Default: the bundle's "
    "own; fewer save time with a large model.",
)
@click.option("--presets", type=FILE, help="File of presets that far tune --save wrote for these weights.")
def export(
    checkpoint: Path,
    vae: Path,
    output: Path,
    weights: str | None,
    levels: str,
    config: tuple[str, ...],
    classes: Path | None,
    default_levels: str | None,
    default_steps: str | None,
    default_guidance: float | None,
    others: tuple[str, ...],
    editing: bool,
    text_encoder: Path | None,
    precision: str,
    calibrate: int | None,
    verify_steps: str | None,
    presets: Path | None,
) -> None:
    """Export CHECKPOINT (an official checkpoint-last.pth, or a .safetensors file) and its VAE as a bundle, which draws
    pictures without torch."""
    from far_export.export import export_bundle
    from far_export.tune.presets import read_presets
    from far_models.checkpoint.load import parse_overrides
    from far_runtime.conditioning.subjects import takes_text
    from far_runtime.sampling.schedule import parse_levels

    level_list = list(parse_levels(default_levels)) if default_levels else None
    options = {"levels": level_list, "steps": default_steps, "guidance": default_guidance}
    defaults = {name: value for name, value in options.items() if value is not None}
    defaults |= parse_overrides(others, "--default")
    bundle = export_bundle(
        checkpoint,
        vae,
        output,
        weights=weights,
        overrides=parse_overrides(config),
        levels=levels,
        defaults=defaults,
        classes=read_classes(classes) if classes else (),
        editing=editing,
        text_encoder=text_encoder,
        precision=precision,
        calibrate=calibrate,
        verify_steps=verify_steps,
        presets=read_presets(presets) if presets else None,
        report=click.echo,
    )
    size = sum(record.bytes for record in bundle.manifest.files.values())
    subject = '--prompt "a red apple"' if takes_text(bundle.manifest) else "--label 0"
    click.echo(
        f"{output}: {len(bundle.manifest.graphs)} graphs, {size / 1e6:.1f} MB; next: far generate {output} {subject}"
    )


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names from a JSON list (.json) or a text file with one name on each line; FarError for any other file."""
    import json

    from far_runtime.errors import FarError

    try:
        text = path.read_text(encoding="utf-8")
        names = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FarError(
            f"--classes {path}: cannot be read ({error}); expected a JSON list or one name a line"
        ) from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FarError(f"--classes {path}: expected a JSON list of names")
    return tuple(names)
