"""`far export`: a checkpoint and its VAE into a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from far_runtime.bundle import CALIBRATION_PICTURES, PRECISIONS

FILE = click.Path(path_type=Path)


@click.command(short_help="Checkpoint and VAE into a bundle of ONNX stages (needs torch).")
@click.argument("checkpoint", type=FILE)
@click.option("--vae", type=FILE, required=True, help="KL-VAE checkpoint: kl16.ckpt, or .safetensors.")
@click.option(
    "-o",
    "--output",
    type=FILE,
    required=True,
    help="Folder of the bundle; an older bundle in it is replaced at the end.",
)
@click.option(
    "--weights",
    type=click.Choice(["model_ema", "model"]),
    help="Which weights of a .pth. Default: model_ema, or model where there is no model_ema.",
)
@click.option(
    "--levels",
    type=click.Choice(["shared", "per-level"]),
    default="shared",
    show_default=True,
    help="One transformer graph that takes the level, or one per level with its constants folded in, which takes more "
    "memory on a CPU.",
)
@click.option(
    "--config",
    "config",
    multiple=True,
    metavar="NAME=VALUE|FILE",
    help="Settings that the weights do not show, as heads=12 or a JSON file; may be repeated.",
)
@click.option("--classes", type=FILE, help="Class names: a JSON list, or a text file with one name a line.")
@click.option("--default-levels", metavar="0,2,3,...", help="Level list that the bundle uses by default.")
@click.option(
    "--default-steps", metavar="100|40:100|...", help="Diffusion steps per level that the bundle uses by default."
)
@click.option("--default-guidance", type=float, help="Guidance that the bundle uses by default.")
@click.option(
    "--default",
    "others",
    multiple=True,
    metavar="NAME=VALUE",
    help="Any other sampling setting that the bundle uses by default, as iterations=32; may be repeated.",
)
@click.option(
    "--editing/--no-editing", default=True, show_default=True, help="With or without the stages that far edit needs."
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
    help="Of the matrix products and convolutions; norms, softmax and the solver's state stay FP32.",
)
@click.option(
    "--calibrate",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Pictures that int8 is calibrated on. Default: {CALIBRATION_PICTURES}.",
)
@click.option(
    "--verify-steps",
    metavar="N|A:B|N,N,...",
    help="Diffusion steps of the picture that a bundle below fp32 is verified with at the end. Default: the bundle's "
    "own; fewer take less time with a large model.",
)
@click.option("--presets", type=FILE, help="Presets that far tune --save wrote for these weights.")
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
    """Export CHECKPOINT (official checkpoint-last.pth, or .safetensors) with its VAE as a bundle that runs without
    torch."""
    from far_export.export import export_bundle
    from far_export.tune.presets import read_presets
    from far_models.checkpoint.load import parse_overrides
    from far_runtime.conditioning.subjects import takes_text
    from far_runtime.sampling.schedule import parse_levels

    levels_given = list(parse_levels(default_levels)) if default_levels else None
    named = {"levels": levels_given, "steps": default_steps, "guidance": default_guidance}
    defaults = {name: value for name, value in named.items() if value is not None} | parse_overrides(
        others, "--default"
    )
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
    """Class names from a JSON list (.json) or a text file with one name a line; FarError where it is neither."""
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
