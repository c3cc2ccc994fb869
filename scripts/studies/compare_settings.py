"""Sampling settings of one's own against a bundle's official schedule, by the distances that far tune measures.

    python scripts/studies/compare_settings.py BUNDLE preset=fast "preset=fast guidance_floor=1.2" [--count 256]

Every argument is a candidate: NAME=VALUE, separated by spaces. Two sets of pictures by the official schedule (or by
--reference) with different seeds come first. The result of a candidate is its distance to one of them, divided by the
distance between the two; the reference itself has 1. Distances are those of image features and of the latents'
frequencies, each measured a second time with the seeds exchanged. The column "calls" counts calls of the transformer,
with two for a guided step.
"""

from __future__ import annotations

from pathlib import Path

import click

from far_export.evaluate.feature_cache import FeatureCache
from far_export.evaluate.features import load_efficientnet
from far_export.tune.distance import Scorer
from far_models.checkpoint.settings import parse_overrides
from far_runtime.pipeline import Pipeline
from far_runtime.sampling.settings import plan_of, resolve_settings
from far_runtime.storage.atomic import user_cache


@click.command(help=__doc__)
@click.argument("path", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.argument("candidates", nargs=-1, required=True)
@click.option("--count", type=click.IntRange(min=2), default=256, show_default=True, help="Pictures of a set.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the first picture.")
@click.option("--engine", default="openvino:cpu:bf16", show_default=True, help="Engine that draws.")
@click.option("--threads", type=int, help="Threads of the engine. Default: its choice.")
@click.option("--reference", default="preset=official", show_default=True, help="Settings of the two sets.")
def main(
    path: Path, candidates: tuple[str, ...], count: int, seed: int, engine: str, threads: int | None, reference: str
) -> None:
    with Pipeline.from_bundle(path, engine, threads) as pipeline:
        manifest = pipeline.bundle.manifest
        settings = {text: resolve_settings(manifest, parse_overrides(tuple(text.split()), text)) for text in candidates}
        facts = {"bundle": manifest.id, "count": count, "seed": seed, **pipeline.surroundings()}
        facts["official"] = resolve_settings(manifest, parse_overrides(tuple(reference.split()), "--reference"))
        cache = FeatureCache(user_cache() / "tune", facts)
        scorer = Scorer(
            pipeline,
            load_efficientnet(),
            count,
            seed,
            cache,
            lambda line: click.echo(line, err=True),
            facts["official"],
        )
        click.echo(
            "| settings | calls | GFLOP | images, both looks | latents, both looks | mean |\n" + "| --- " * 6 + "|"
        )
        for text, given in settings.items():
            looks = scorer(given), scorer.confirm(given)
            steps = plan_of(manifest, given)
            calls = sum(call.rows for step in steps for call in step.calls if call.stage == "transformer")
            images, latents = [look.image for look in looks], [look.latents for look in looks]
            mean = sum(look.ratio for look in looks) / 2
            click.echo(
                f"| {text} | {calls} | {looks[0].flops / 1e9:.1f} | {images[0]:.2f}, {images[1]:.2f} | "
                f"{latents[0]:.2f}, {latents[1]:.2f} | {mean:.2f} |"
            )


if __name__ == "__main__":
    main()
