"""MAR through the exporter and the commands: its graphs at every size, and the way from checkpoint to a repeated
picture."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from far_export.compare import compare
from far_export.export import declare, load
from far_export.load import load_pair
from far_export.options import ExportOptions
from far_export.stages.flops import count_flops
from far_export.torch_engine import TorchEngine
from far_export.verify.reference import reference_stages
from far_runtime.bundle import open_bundle, write_manifest
from far_runtime.cli.main import main
from far_runtime.engines import open_engine
from far_runtime.engines.base import Engine, EngineOptions
from far_runtime.images.writing import read_metadata
from far_runtime.sampling.flops import row_flops

if TYPE_CHECKING:
    from conftest import Tiny


@pytest.fixture(scope="module")
def engines(tiny: Tiny) -> Iterator[tuple[Engine, Engine]]:
    """The bundle's graphs on ONNX Runtime, and the torch modules that they came from."""
    bundle = open_bundle(tiny.mar_bundle)
    model, vae = (loaded.model for loaded in load_pair(tiny.mar, tiny.vae))
    engine = open_engine(bundle, "onnxruntime", EngineOptions(threads=1))
    yield engine, TorchEngine(reference_stages(bundle.manifest, model, vae))
    engine.close()


def error(engines: tuple[Engine, Engine], stage: str, inputs: dict[str, np.ndarray]) -> float:
    """Largest relative error of a stage's outputs on the first engine."""
    outputs = []
    for engine in engines:
        found = engine.run(stage, {name: engine.put(array) for name, array in inputs.items()})
        outputs.append({name: engine.get(array) for name, array in found.items()})
    ours, theirs = outputs
    return max(compare(ours[name], array).error for name, array in theirs.items())


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("count", "tokens"), [(0, 1), (0, 16), (1, 1), (5, 3), (15, 1), (8, 8)])
def test_graphs_compute_what_the_modules_do(
    engines: tuple[Engine, Engine], halves: int, batch: int, count: int, tokens: int
) -> None:
    random = np.random.default_rng(count * 100 + tokens)
    orders = np.stack([random.permutation(16) for _ in range(batch)])
    visible, predicted = np.sort(orders[:, :count], axis=1), np.sort(orders[:, count : count + tokens], axis=1)
    restore = np.full((batch, 16), count)
    for row, places in zip(restore, visible, strict=True):
        row[places] = np.arange(count)
    labels = random.integers(0, 11, halves * batch)
    latents, noise = (random.standard_normal((batch, n, 4), np.float32) for n in (16, tokens))
    inputs = {"latents": latents, "labels": labels, "visible": visible, "restore": restore, "predicted": predicted}
    assert error(engines, "transformer", inputs) < 1e-5
    head = random.standard_normal((halves * batch, tokens, 32), np.float32)
    inputs = {
        "state": latents[:, :tokens].copy(),
        "condition": head,
        "timestep": np.array([333.0], np.float32),
        "coefficients": np.array([1.1, -0.3, -4.0, -5.0, 0.9, 0.2, 1.3, -0.7], np.float32),
        "guidance": np.full(batch, 1.0 if halves == 1 else 2.5, np.float32),
        "noise": noise,
        "history": noise - 1,
    }
    assert error(engines, "denoise", inputs) < 1e-5
    index = random.integers(0, 16 + tokens, (batch, 16))
    assert error(engines, "place", {"latents": latents, "sample": noise, "index": index}) == 0


def test_hidden_latents_and_other_tokens_change_nothing(engines: tuple[Engine, Engine]) -> None:
    """The encoder sees the visible tokens alone; a token's condition does not depend on what is predicted beside it."""
    engine = engines[0]
    random = np.random.default_rng(0)
    latents = random.standard_normal((1, 16, 4), np.float32)
    visible, restore = np.array([[3, 7]]), np.full((1, 16), 2)
    restore[0, [3, 7]] = 0, 1

    def condition(latents: np.ndarray, predicted: list[int]) -> Any:
        inputs = {
            "latents": latents, "labels": np.array([4]), "visible": visible, "restore": restore,
            "predicted": np.array([predicted]),
        }  # fmt: skip
        put = {name: engine.put(array) for name, array in inputs.items()}
        return engine.get(engine.run("transformer", put)["condition"])

    usual = condition(latents, [0, 5, 9])
    other = latents.copy()
    other[0, [0, 5, 9, 15]] += 1
    assert compare(condition(other, [0, 5, 9]), usual).error < 1e-6
    assert compare(condition(latents, [5]), usual[:, 1:2]).error < 1e-5
    other[0, 3] += 1
    assert compare(condition(other, [0, 5, 9]), usual).error > 1e-3


def far(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a far command."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    return int(ended.value.code or 0), out, err


def test_from_checkpoint_to_a_repeated_picture(
    tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its graphs are those of the bundle that all tests share; the rest is declared as for any export."""
    monkeypatch.chdir(tmp_path)
    defaults = {"iterations": 5, "guidance_schedule": "constant", "steps": "4:2", "guidance": 2.0}
    options = ExportOptions(defaults=defaults, editing=False)
    declared, stages = declare(load(tiny.mar, tiny.vae, options), options)
    assert declared.system == "mar" and declared.model.record["masked"] and declared.model.condition == "labels"
    assert [stage.stage for stage in stages] == ["transformer", "denoise", "place", "decode"]
    shutil.copytree(tiny.mar_bundle, "bundle", ignore=shutil.ignore_patterns("engines"))
    exported = open_bundle("bundle").manifest
    assert [graph.stage for graph in exported.graphs] == [*(stage.stage for stage in stages), "encode"]
    write_manifest(Path("bundle"), replace(exported, default_settings=declared.default_settings))

    code, out, _ = far(capfd, "inspect", "bundle")
    assert code == 0
    assert "mar bundle" in out and "iteration" in out and "masked, 4 x 4 x 4 latents, 16 pixels, 10 classes" in out

    code, out, err = far(
        capfd, "generate", "bundle", "--label", 3, "--label", 9, "--count", 2, "--each", "each", "--save-levels",
        "--threads", 1,
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "out-levels.png: the way to the picture in 5 steps" in out
    originals = sorted(Path("each").iterdir())
    assert [path.name for path in originals] == [f"{label}-seed-{seed}.png" for label in (3, 9) for seed in (0, 1)]
    wanted = {"iterations": 5, "steps": [4, 4, 3, 2, 2], "guidance": 2.0, "guidance_schedule": "constant"}
    official = {"temperature": 1.0, "solver": "ddpm", "start": None, "guidance_floor": 1.0}
    assert read_metadata(originals[0]).sampling == wanted | official

    code, out, err = far(capfd, "generate", "bundle", "--like", originals[3], "-o", "again.png")
    assert (code, err) == (0, "")
    assert f"{originals[3]}: repeated bit for bit" in out
    assert np.array_equal(np.asarray(Image.open("again.png")), np.asarray(Image.open(originals[3])))

    code, out, err = far(
        capfd, "verify", "bundle", "--checkpoint", tiny.mar, "--vae", tiny.vae, "--iterations", 3, "--steps", 2,
        "--guidance-schedule", "linear", "--threads", 1,
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "iteration 3" in out and "iteration 4" not in out and "passed: worst stage error" in out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--levels", "0,1"], "--levels: a mar model has no such setting; it takes --iterations, --steps, --solver, "
                              "--start, --guidance, --guidance-floor, --temperature, --guidance-schedule"),
        (["--levels", "0,1", "--top-k", "1"], "--levels, --top-k: a mar model has no such setting"),
        (["--prompt", "fog"], "this bundle draws from class labels, not from text; use --label in place of --prompt"),
        (["--negative", "fog"], "use --label in place of --negative"),
        (["--iterations", "0"], "--iterations 0: expected a whole number from 1 to 16, the tokens of a picture; use "
                                "--iterations 16, say"),
        (["--iterations", "17"], "--iterations 17: expected a whole number from 1 to 16"),
        (["--iterations", "some"], "'some' is not a valid integer"),
        (["--guidance-schedule", "cosine"], "--guidance-schedule cosine: expected linear or constant"),
        (["--guidance", "-1"], "--guidance -1.0: expected a number of 0 or more"),
        (["--steps", "1,2"], "--steps names 2 iterations, the schedule has 4; give one number, a range, or 4 numbers"),
        (["--steps", "0"], "expected 1 to 1000"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["generate", "verify"])
def test_bad_settings_get_one_line_and_exit_code_2(
    tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str,
    arguments: list[str], reason: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    more = ["--checkpoint", tiny.mar] if command == "verify" else []
    code, out, err = far(capfd, command, tiny.mar_bundle, *more, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and reason in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--default-levels", "0,1"], "--levels: a mar model has no such setting; it takes --iterations, "),
        (["--default", "iterations=99"], "--iterations 99: expected a whole number from 1 to 16"),
        (["--default", "iterations=many"], "--iterations many: expected a whole number from 1 to 16"),
        (["--default", "guidance=[1]"], "--guidance [1]: expected a number of 0 or more"),
        (["--default", "guidance_schedule=cosine"], "--guidance-schedule cosine: expected linear or constant"),
        (["--default", "pace=3"], "--pace: a mar model has no such setting"),
        (["--levels", "per-level"], "--levels per-level: a mar model has no levels; leave --levels out"),
        (["--config", "masked=false"], "--config masked=False: mar.pth is a MAR, which is masked; leave it out"),
        (["--config", "masked=perhaps"], "--config masked='perhaps': expected true or false"),
    ],
)
def test_bad_settings_of_an_export_leave_nothing(
    tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    code, out, err = far(capfd, "export", tiny.mar, "--vae", tiny.vae, "-o", tmp_path / "bundle", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and reason in err
    assert list(tmp_path.iterdir()) == []


def test_the_checkpoint_of_another_system_is_named(tiny: Tiny, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = far(capfd, "verify", tiny.mar_bundle, "--checkpoint", tiny.masked)
    assert (code, out) == (2, "")
    assert err == f"error: {tiny.masked}: is a far checkpoint; expected mar here\n"


def test_the_arithmetic_is_counted_of_what_is_computed(tiny: Tiny) -> None:
    """The last block computes the predicted tokens alone."""
    bundle = open_bundle(tiny.mar_bundle)
    mar = load_pair(tiny.mar, tiny.vae)[0].model.to("meta")
    graph = bundle.manifest.graph("transformer", {})
    with torch.device("meta"):
        latents, classes = torch.empty(1, 16, 4), torch.empty(1, mar.config.encoder_width)
        for count, tokens in ((1, 1), (5, 3), (8, 8)):
            indices = [torch.empty(1, n, dtype=torch.int64) for n in (count, 16, tokens)]
            wanted = count_flops(mar.features, (latents, classes, *indices))
            wanted += 2.0 * tokens * mar.config.decoder_width * mar.config.head_width
            assert row_flops(graph, {"count": count, "tokens": tokens}) == pytest.approx(wanted)
