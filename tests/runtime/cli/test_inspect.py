"""`far inspect`, and the arithmetic that it reports."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from far_runtime.bundle import Graph, Manifest, manifest_checksum, open_bundle, sha256_of, write_manifest
from far_runtime.sampling import far as far_loop
from far_runtime.sampling import mar as mar_loop
from far_runtime.sampling.flops import call_flops, picture_cost, row_flops, step_flops
from model_infos import far_info, mar_info


def test_the_tables_show_stages_shapes_schedule_classes_and_checksums(far: Any, tiny: Any) -> None:
    result = far("inspect", tiny.bundle)
    assert (result.code, result.err) == (0, "")
    text = " ".join(result.out.split())
    assert "unmasked, 4 x 4 x 4 latents, 16 pixels, 10 classes, predicts v" in text
    for part in ("transformer", "denoise", "decode", "place", "encode"):
        assert part in text
    assert "latents float32 [batch, 16, 4]" in text
    assert "pixels uint8 [batch, 16, 16, 3]" in text
    assert "0 crane, 1 red fox, 2 fox terrier" in text
    assert sha256_of(tiny.bundle / "weights.bin")[:16] in text
    assert sha256_of(tiny.bundle / "weights.bin") not in text
    assert "all as exported" in text
    assert "not compared with the files" in far("inspect", tiny.bundle, "--no-check").out


def test_the_schedule_table_names_the_steps_of_the_system(far: Any, tiny: Any) -> None:
    def rows(bundle: Path) -> list[list[str]]:
        lines = far("inspect", bundle).out.splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith("Default schedule"))
        table = itertools.takewhile(str.strip, lines[start + 2 :])
        return [line.split() for line in table if "─" not in line]

    head, *steps = rows(tiny.masked_bundle)
    assert head[:5] == ["level", "diffusion", "steps", "guidance", "temperature"] and head[-1] == "graph"
    assert [step[:5] for step in steps] == [["0", "3", "1", "0.85", "0"], ["2", "3", "2", "0.925", "5"]]
    assert [step[-1] for step in steps] == ["transformer_00_level00", "transformer_01_level02"]
    head, *steps = rows(tiny.mar_bundle)
    assert head[0] == "iteration" and {"visible", "tokens"} <= set(head)
    assert [step[:6] for step in steps] == [
        ["1", "3", "1.24", "1", "0", "2"], ["2", "3", "1.59", "1", "2", "3"],
        ["3", "3", "2.19", "1", "5", "5"], ["4", "3", "2.78", "1", "10", "6"],
    ]  # fmt: skip


@pytest.mark.parametrize("variant", ["bundle", "masked_bundle", "mar_bundle"])
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
    kind, numbers, visible = {
        "bundle": ("level", [0, 1, 2, 3], [16] * 4),
        "masked_bundle": ("level", [0, 2], [0, 5]),
        "mar_bundle": ("iteration", [1, 2, 3, 4], [0, 2, 5, 10]),
    }[variant]
    assert [(row["kind"], row["number"]) for row in facts["schedule"]] == [(kind, number) for number in numbers]
    assert [row["visible"] for row in facts["schedule"]] == visible
    assert [row["inner"] for row in facts["schedule"]] == [3] * len(numbers)
    assert facts["defaults"]["steps"] == 3
    assert ("iterations" in facts["defaults"]) is (variant == "mar_bundle")
    assert set(facts["gflop"]) == {"transformer", "denoise", "decode"}
    assert facts["gflop_total"] == pytest.approx(sum(facts["gflop"].values()))
    of_steps = sum(row["gflop"] for row in facts["schedule"])
    assert facts["gflop_total"] == pytest.approx(of_steps + facts["gflop"]["decode"])
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
    def graph(stage: str, **flops: float) -> Graph:
        terms = {name.replace("_", " ").replace("once", ""): value for name, value in flops.items()}
        return Graph(stage, stage, "", (), (), 1e-4, flops=terms)

    graphs = (graph("transformer", once=100.0, count=10.0, count_count=1.0), graph("denoise", once=7.0))
    return Manifest("far", far_info(4), {}, (*graphs, graph("decode", once=1000.0)), {})


def test_guided_steps_cost_two_rows_and_visible_tokens_count() -> None:
    model = far_info(4, masked=True)
    steps = far_loop.plan(
        model, far_loop.resolve_settings(model, {"levels": [0, 1, 2, 3], "guidance": 3.0, "steps": "2:5"})
    )
    assert [step.visible for step in steps] == [0, 2, 5, 10]
    manifest = toy_manifest()
    costs = [[call_flops(manifest, call) for call in step.calls] for step in steps]
    assert costs == [[100, 7 * 2], [2 * 124, 2 * 7 * 3], [2 * 175, 2 * 7 * 4], [2 * 300, 2 * 7 * 5]]
    assert [step_flops(manifest, step) for step in steps] == [sum(cost) for cost in costs]
    assert picture_cost(manifest, steps) == {"transformer": 1298, "denoise": 182, "decode": 1000}


def test_the_predicted_tokens_of_an_iteration_count() -> None:
    """The head runs for the tokens of an iteration alone: with constant guidance, one run of it for every token."""
    graphs = tuple(
        replace(graph, flops={"tokens": 7.0} if graph.stage == "denoise" else graph.flops)
        for graph in toy_manifest().graphs
    )
    manifest = replace(toy_manifest(), system="mar", graphs=graphs)
    model = mar_info(4)
    for iterations in (1, 3, 16):
        settings = {"iterations": iterations, "steps": 5, "guidance": 2.0, "guidance_schedule": "constant"}
        steps = mar_loop.plan(model, mar_loop.resolve_settings(model, settings))
        costs = picture_cost(manifest, steps)
        visible = [step.visible for step in steps]
        assert costs["denoise"] == 2 * 5 * 7 * 16
        assert costs["transformer"] == sum(2 * (100 + 10 * count + count * count) for count in visible)


def test_row_flops_is_a_polynomial() -> None:
    graph = toy_manifest().graphs[0]
    assert row_flops(graph, {"count": 3, "tokens": 9}) == 100 + 30 + 9
    assert row_flops(replace(graph, flops={"": 1.0, "tokens keys": 2.0}), {"tokens": 3, "keys": 5}) == 1 + 30
    assert row_flops(replace(graph, flops={}), {"count": 3}) == 0


def test_far_b_costs_what_the_released_code_costs_less_what_is_done_once() -> None:
    """The released code takes 38.9 TFLOP before decoding: every level guided, 100 steps, and in each of these the
    projection of z and the time embedding for every token and row."""
    torch = pytest.importorskip("torch")
    from far_export.stages import far as far_graphs
    from far_export.stages import vae as vae_graphs
    from far_models.far import FAR, PRESETS
    from far_models.kl_vae import AutoencoderKL, VAEConfig

    config = PRESETS["far_base"]
    with torch.device("meta"):
        model, vae = FAR(config), AutoencoderKL(VAEConfig())
    stages = [*far_graphs.stages(model), vae_graphs.decode_stage(vae, config.grid, config.latent_scale)]
    graphs = tuple(Graph(s.name, s.stage, "", (), (), s.tolerance, flops=dict(s.flops)) for s in stages)
    manifest = Manifest("far", far_info(4), {}, graphs, {})
    model_info = far_info(config.grid)
    steps = far_loop.plan(model_info, far_loop.resolve_settings(model_info, {"guidance": 3.0}))
    assert [call.rows for call in steps[0].calls] == [1, 1]
    ours = picture_cost(manifest, steps)
    first = replace(steps[0], calls=tuple(replace(call, rows=2) for call in steps[0].calls))
    all_guided = picture_cost(manifest, [first, *steps[1:]])
    width, rows = config.head_width, 10 * 100 * 2 * config.tokens
    repeated = 2 * rows * (config.decoder_width * width + 256 * width + width * width)
    released = all_guided["transformer"] + all_guided["denoise"] + repeated
    assert released == pytest.approx(38.9e12, rel=2e-3)
    assert (all_guided["denoise"] + repeated) / released == pytest.approx(0.94, abs=5e-3)
    assert ours["denoise"] == pytest.approx(all_guided["denoise"] * 19 / 20)
    assert ours["transformer"] == pytest.approx(all_guided["transformer"] * 19 / 20)
    assert sum(ours.values()) == pytest.approx(35.2e12, rel=2e-3)


def test_a_source_that_is_a_number_is_shown(far: Any, bundle_copy: Path) -> None:
    manifest = open_bundle(bundle_copy).manifest
    write_manifest(bundle_copy, replace(manifest, source={**manifest.source, "calibrate": 16}))
    result = far("inspect", bundle_copy)
    assert result.code == 0 and "calibrate: 16" in result.out.splitlines()
