"""`far inspect`, and the arithmetic that it reports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from far_runtime.bundle import Graph, Manifest, manifest_checksum, open_bundle, sha256_of
from far_runtime.cost import picture_cost, row_flops, step_costs
from far_runtime.samplers.far import plan
from far_runtime.schedule import make_schedule, official_levels


def test_the_tables_show_stages_shapes_schedule_classes_and_checksums(far: Any, tiny: Any) -> None:
    result = far("inspect", tiny.bundle)
    assert (result.code, result.err) == (0, "")
    text = " ".join(result.out.split())
    assert "unmasked, 4 x 4 x 4 latents, 16 pixels, 10 classes, predicts v" in text
    for part in ("transformer", "denoise", "decode"):
        assert part in text
    assert "latents float32 [batch, 16, 4]" in text
    assert "pixels uint8 [batch, 16, 16, 3]" in text
    assert "0 crane, 1 red fox, 2 fox terrier" in text
    assert sha256_of(tiny.bundle / "weights.bin")[:16] in text
    assert sha256_of(tiny.bundle / "weights.bin") not in text
    assert "all as exported" in text
    assert "not compared with the files" in far("inspect", tiny.bundle, "--no-check").out


@pytest.mark.parametrize("variant", ["bundle", "masked_bundle"])
def test_json_has_everything(far: Any, tiny: Any, variant: str) -> None:
    folder: Path = getattr(tiny, variant)
    facts = json.loads(far("inspect", folder, "--json").out)
    manifest = open_bundle(folder).manifest
    assert facts["id"] == manifest.id
    assert facts["files"] == {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in manifest.files
    }
    assert [graph["name"] for graph in facts["graphs"]] == [graph.name for graph in manifest.graphs]
    assert {graph["stage"]: graph["parameters"] for graph in facts["graphs"]}["denoise"] > 10_000
    masked = variant == "masked_bundle"
    assert [row["level"] for row in facts["schedule"]] == ([0, 2] if masked else [0, 1, 2, 3])
    assert [row["visible"] for row in facts["schedule"]] == ([0, 5] if masked else [16] * 4)
    assert facts["gflop_total"] == pytest.approx(sum(facts["gflop"].values()))
    of_levels = sum(row["gflop"] for row in facts["schedule"])
    assert facts["gflop_total"] == pytest.approx(of_levels + facts["gflop"]["decode"])
    assert facts["classes"] == list(manifest.classes)
    assert facts["source"]["vae"]["file"] == "vae.ckpt"


def test_a_damaged_bundle_names_the_file(far: Any, bundle_copy: Path) -> None:
    data = bytearray((bundle_copy / "weights.bin").read_bytes())
    data[0] ^= 255
    (bundle_copy / "weights.bin").write_bytes(data)
    result = far("inspect", bundle_copy)
    assert (result.code, result.out) == (2, "")
    assert f"{bundle_copy / 'weights.bin'}: changed since export" in result.err
    assert far("inspect", bundle_copy, "--no-check").code == 0


def test_many_classes_are_shortened(far: Any, bundle_copy: Path) -> None:
    manifest = json.loads((bundle_copy / "manifest.json").read_text())
    manifest["model"]["classes"] = 1000
    manifest["classes"] = [f"thing{i}" for i in range(1000)]
    manifest["sha256"] = manifest_checksum(manifest)
    (bundle_copy / "manifest.json").write_text(json.dumps(manifest))
    last = far("inspect", bundle_copy).out.splitlines()[-1]
    assert last == "Classes: 0 thing0, 1 thing1, 2 thing2, 3 thing3, 4 thing4, ... 999 thing999"


def toy_manifest() -> Manifest:
    def graph(stage: str, *flops: float, **constants: int) -> Graph:
        return Graph(stage + str(constants), stage, "", (), (), 1e-4, constants, flops)

    graphs = (graph("transformer", 100.0, 10.0, 1.0), graph("denoise", 7.0), graph("decode", 1000.0))
    return Manifest("far", {}, {}, graphs, {})


def test_guided_steps_cost_two_rows_and_visible_tokens_count() -> None:
    schedule = make_schedule([0, 1, 2, 3], grid=4, masked=True, guidance=3.0, steps="2:5")
    steps = plan(schedule, 4, masked=True)
    assert [step.visible for step in steps] == [0, 2, 5, 10]
    costs = step_costs(toy_manifest(), steps)
    assert [cost.transformer for cost in costs] == [100, 2 * 124, 2 * 175, 2 * 300]
    assert [cost.denoise for cost in costs] == [7 * 2, 2 * 7 * 3, 2 * 7 * 4, 2 * 7 * 5]
    assert picture_cost(toy_manifest(), steps) == {"transformer": 1298, "denoise": 182, "decode": 1000}


def test_row_flops_is_a_polynomial() -> None:
    assert row_flops(toy_manifest().graphs[0], 3) == 100 + 30 + 9
    assert row_flops(replace(toy_manifest().graphs[0], flops=()), 3) == 0


def test_far_b_costs_what_the_released_code_costs_less_what_is_done_once() -> None:
    """The released code takes 38.9 TFLOP before decoding: every level guided, 100 steps, and in each of these the
    projection of z and the time embedding for every token and row."""
    torch = pytest.importorskip("torch")
    from far_export.graphs import far as far_graphs
    from far_export.graphs import vae as vae_graphs
    from far_models.far import FAR, PRESETS
    from far_models.kl_vae import AutoencoderKL, VAEConfig

    config = PRESETS["far_base"]
    with torch.device("meta"):
        model, vae = FAR(config), AutoencoderKL(VAEConfig())
    stages = [*far_graphs.stages(model), vae_graphs.decode_stage(vae, config.grid, config.latent_scale)]
    graphs = tuple(Graph(s.name, s.stage, "", (), (), s.tolerance, flops=s.flops) for s in stages)
    manifest = Manifest("far", {}, {}, graphs, {})
    steps = plan(make_schedule(official_levels(16, False), grid=16, guidance=3.0), 16, masked=False)
    ours = picture_cost(manifest, steps)
    all_guided = picture_cost(manifest, [replace(step, guidance=2.0) for step in steps])
    width, rows = config.head_width, 10 * 100 * 2 * config.tokens
    repeated = 2 * rows * (config.decoder_width * width + 256 * width + width * width)
    released = all_guided["transformer"] + all_guided["denoise"] + repeated
    assert released == pytest.approx(38.9e12, rel=2e-3)
    assert (all_guided["denoise"] + repeated) / released == pytest.approx(0.94, abs=5e-3)
    assert ours["denoise"] == pytest.approx(all_guided["denoise"] * 19 / 20)
    assert ours["transformer"] == pytest.approx(all_guided["transformer"] * 19 / 20)
    assert sum(ours.values()) == pytest.approx(35.2e12, rel=2e-3)
