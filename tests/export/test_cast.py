"""FP16 and BF16: islands that are honoured, graphs whose types are proved, and wrong results that are refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from far_export.cast import CAST_DTYPES, cast_stages
from far_export.export import export_bundle
from far_export.load import load_pair
from far_export.onnx.tensor_ranges import tensor_ranges
from far_export.onnx.writer import export_stages
from far_export.stages import SYSTEMS
from far_export.stages.stage import Input, Stage
from far_export.tolerances import LIMITS, free_run_limits, stage_tolerance
from far_export.torch_engine import Float32MatMuls, Fp16Engine, TorchEngine
from far_models.islands import island
from far_runtime.bundle import Bundle, Manifest, TensorSpec, open_bundle
from far_runtime.cli.main import main
from far_runtime.engines import open_engine
from far_runtime.engines.base import EngineOptions
from far_runtime.errors import CheckFailed, FarError
from far_runtime.pipeline import Pipeline

FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


@pytest.fixture(scope="module")
def fp16(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny FAR in FP16, as far export makes it."""
    path = tmp_path_factory.mktemp("fp16") / "bundle"
    export_bundle(tiny.safetensors, tiny.vae, path, precision="fp16", defaults={"steps": "3"}, editing=False)
    return path


def stages_of(tiny: Any) -> list[Stage]:
    model, vae = (loaded.model for loaded in load_pair(tiny.safetensors, tiny.vae))
    system = SYSTEMS["far"]
    return system.stages(model, vae, system.info(model, vae), None)


@pytest.mark.slow
def test_weights_have_16_bits_and_loops_see_float32(tiny: Any, fp16: Path) -> None:
    ours, theirs = open_bundle(fp16).manifest, open_bundle(tiny.bundle).manifest
    assert ours.precision == "fp16"
    assert {graph.precision for graph in ours.graphs} == {"fp16"}
    for graph in ours.graphs:
        twin = theirs.graph(graph.stage, {})
        assert (graph.inputs, graph.outputs) == (twin.inputs, twin.outputs)
        held = onnx.load(fp16 / graph.file, load_external_data=False)
        large = [t.data_type for t in held.graph.initializer if math.prod(t.dims) > 1000]
        # What is larger in FP32 are tables outside of the products: low-pass matrices.
        assert large.count(HALF) >= len(large) - 1
    # The tiny model's encode stage, which this bundle leaves out, and norms weigh as well.
    assert (fp16 / "weights.bin").stat().st_size < 0.6 * (tiny.bundle / "weights.bin").stat().st_size


@pytest.mark.slow
def test_pictures_stay_what_they_are(tiny: Any, fp16: Path) -> None:
    with Pipeline.from_bundle(tiny.bundle, "onnxruntime", threads=1) as one:
        expected = one.generate([1, 2], [0, 1])
    with Pipeline.from_bundle(fp16, "onnxruntime", threads=1) as other:
        made = other.generate([1, 2], [0, 1])
    error = np.linalg.norm(made.latents - expected.latents) / np.linalg.norm(expected.latents)
    assert 0 < error < LIMITS["fp16"].loop


@pytest.mark.slow
def test_tensorrt_rtx_builds_every_fp16_stage_and_computes_in_it(
    fp16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from far_runtime.engines.tensorrt.builder.build import build_engines
    from far_runtime.engines.tensorrt.builder.options import BuildOptions

    pytest.importorskip("polygraphy")
    rtx()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    notes = build_engines(open_bundle(fp16), "tensorrt-rtx", BuildOptions(targets=("sm89",))).notes
    for stage in ("transformer", "denoise", "decode"):
        products = notes[stage]["products"]
        assert products["fp16"] > products.get("fp32", 0), stage


@pytest.mark.slow
@pytest.mark.parametrize("precision", list(CAST_DTYPES))
def test_tensorrt_rtx_takes_vars_transformer_with_its_growing_keys(tmp_path: Path, precision: str) -> None:
    """Normalised queries and keys are FP32 islands between 16-bit products."""
    from far_export.stages.var import transformer_stage
    from far_models.var import VAR, VARConfig
    from far_runtime.engines.tensorrt.builder.precision import network_products

    trt = rtx()
    torch.manual_seed(0)
    var = VAR(VARConfig(patch_nums=(1, 2, 3), channels=4, vocabulary=16, classes=5, width=64, depth=1, heads=1))
    (graph,) = export_stages(cast_stages([transformer_stage(var.eval().requires_grad_(False))], precision), tmp_path)
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    assert parser.parse_from_file(str(tmp_path / graph.file)), parser.get_error(0)
    assert {product.precision for product in network_products(trt, network)} == {precision}
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    for spec in graph.inputs:
        sizes = [[graph.profile[axis][i] if isinstance(axis, str) else axis for axis in spec.shape] for i in range(3)]
        profile.set_shape(spec.name, *sizes)
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config).nbytes > 1000


def rtx() -> Any:
    """TensorRT-RTX; skips where it is not there."""
    try:
        import tensorrt_rtx
    except (ImportError, OSError):
        pytest.skip("tensorrt_rtx is not there: it has wheels for x86-64 only")
    return tensorrt_rtx


def test_onnxruntime_on_the_cpu_says_what_it_cannot_and_who_can(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed on this machine")
    graphs = export_stages(cast_stages([mlp_stage(1.0)], "bf16"), tmp_path)
    bundle = Bundle(tmp_path, Manifest("stages", {}, {}, graphs, {}, precision="bf16"))
    engine = open_engine(bundle, "onnxruntime", EngineOptions(threads=1))
    with pytest.raises(FarError, match=r"mlp\.onnx: is in BF16, .* use engine openvino"):
        engine.run("mlp", {"x": engine.put(np.ones((1, 4), np.float32))})


@pytest.mark.slow
def test_bf16_is_checked_by_an_engine_that_has_its_kernels(
    tiny: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed on this machine")
    with pytest.raises(SystemExit) as caught:
        main(["export", str(tiny.safetensors), "--vae", str(tiny.vae), "-o", str(tmp_path / "b"), "--precision", "bf16",
              "--default-steps", "3", "--no-editing"])  # fmt: skip
    out = capfd.readouterr().out
    assert caught.value.code == 0, out
    assert "OpenVINO agrees with torch" in out
    assert "verifying: a picture on openvino:cpu" in out
    assert open_bundle(tmp_path / "b").manifest.precision == "bf16"


def overflowing(tiny: Any, path: Path) -> Path:
    """The tiny FAR with one MLP whose hidden values leave FP16's range, and come back before the block ends."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(tiny.safetensors, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    name = next(n for n in tensors if n.startswith("decoder_blocks.0.mlp.fc1.weight"))
    tensors[name] = tensors[name] * 1e6
    tensors["decoder_blocks.0.mlp.fc2.weight"] = tensors["decoder_blocks.0.mlp.fc2.weight"] * 1e-6
    save_file(tensors, path, metadata)
    return path


@pytest.mark.slow
def test_a_model_that_leaves_fp16s_range_is_refused_and_the_tensor_named(
    tiny: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = overflowing(tiny, tmp_path / "wild.safetensors")
    older = tmp_path / "bundle"
    older.mkdir()
    for file in tiny.bundle.iterdir():
        (older / file.name).write_bytes(file.read_bytes())
    before = open_bundle(older).manifest.id
    with pytest.raises(SystemExit) as caught:
        main(["export", str(checkpoint), "--vae", str(tiny.vae), "-o", str(older), "--precision", "fp16",
              "--default-steps", "2", "--no-editing"])  # fmt: skip
    err = capfd.readouterr().err
    assert caught.value.code == 1
    assert len(err.strip().splitlines()) == 1
    assert "far.decoder_blocks.0.mlp.fc1/" in err and "FP16 ends at 65504; export it with" in err
    assert open_bundle(older).manifest.id == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "wild.safetensors"]


class Mlp(nn.Module):
    """x [B, 4] through two products whose hidden values are `size` times as large."""

    def __init__(self, size: float, width: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, width), nn.Linear(width, 4)
        with torch.no_grad():
            self.first.weight.fill_(size)
            self.second.weight.fill_(1 / size)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.to(self.first.weight.dtype)))


def mlp_stage(size: float, islands: tuple[str, ...] = (), width: int = 8) -> Stage:
    return Stage(
        stage="mlp",
        module=Mlp(size, width).eval().requires_grad_(False),
        inputs=(Input("x", ("batch", 4)),),
        outputs=(TensorSpec("y", "float32", ("batch", 4)),),
        profile={"batch": (1, 2, 4)},
        fp32_islands=islands,
    )


def test_the_first_tensor_out_of_range_is_named_though_the_cpu_goes_on(tmp_path: Path) -> None:
    """ONNX Runtime computes in float32 behind casts: its result is finite, a GPU's would not be."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed on this machine")
    export_stages(cast_stages([mlp_stage(3e4)], "fp16"), tmp_path)
    ones = {"x": np.ones((2, 4), np.float32)}
    found = tensor_ranges(tmp_path / "mlp.onnx", [ones])
    assert found.calls == 1
    assert "node first/" in found.overflow and "FP16 ends at 65504" in found.overflow
    export_stages(cast_stages([mlp_stage(1e3)], "fp16"), tmp_path)
    found = tensor_ranges(tmp_path / "mlp.onnx", [ones])
    assert not found.overflow
    assert found.largest == pytest.approx(4000, rel=0.01)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlp.onnx", "weights.bin"]


def test_nothing_is_written_to_look_at_a_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle may be read-only, and what cannot be written there would hide an overflow."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed on this machine")
    export_stages(cast_stages([mlp_stage(3e4, width=512)], "fp16"), tmp_path)
    assert (tmp_path / "weights.bin").stat().st_size > 4096

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("read-only file system")

    monkeypatch.setattr(ir, "save", refuse)
    assert "FP16 ends at 65504" in tensor_ranges(tmp_path / "mlp.onnx", [{"x": np.ones((2, 4), np.float32)}]).overflow


def test_what_was_not_looked_at_says_why(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed on this machine")
    export_stages(cast_stages([mlp_stage(1.0)], "fp16"), tmp_path)
    found = tensor_ranges(tmp_path / "mlp.onnx", [{"x": np.ones((2, 5), np.float32)}])
    assert found.calls == 0 and "onnxruntime does not run it" in found.skipped


def test_half_arithmetic_rounds_and_overflows_as_a_gpus_does() -> None:
    a = torch.full((1, 4), 300.0, dtype=torch.float16)
    with Float32MatMuls():
        assert (a @ a.T).item() == math.inf
        assert torch.nn.functional.linear(a / 4, a / 4).item() == 22496  # 22500, rounded to 16
    stage = cast_stages([mlp_stage(3e4)], "fp16")
    engine = Fp16Engine(stage)
    assert not np.isfinite(engine.get(engine.run("mlp", {"x": engine.put(np.ones((1, 4), np.float32))})["y"])).all()


def test_a_declared_island_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="island 'norm' matches no part of its module"):
        export_stages(cast_stages([mlp_stage(1.0, ("norm",))], "fp16"), tmp_path)


def test_an_island_that_is_not_declared_is_an_error(tmp_path: Path) -> None:
    class Wide(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            island("gain")
            return super().forward(x.float())

    stage = replace(mlp_stage(1.0), module=Wide(1.0).eval())
    with pytest.raises(CheckFailed, match="computes 'gain' in FP32, which its fp32_islands do not name"):
        export_stages(cast_stages([stage], "fp16"), tmp_path)


def test_an_island_by_its_module_keeps_float32(tmp_path: Path) -> None:
    stages = cast_stages([mlp_stage(3e4, ("first",))], "fp16")
    assert stages[0].module.first.weight.dtype == torch.float32
    assert stages[0].module.second.weight.dtype == torch.float16
    with pytest.raises(CheckFailed, match="first"):  # its product is FP32, and so no island of its name is needed there
        export_stages([replace(stages[0], fp32_islands=())], tmp_path)


def test_a_product_in_float32_is_found_in_the_graph(tmp_path: Path) -> None:
    """A stage that says FP16 of itself, and was not cast."""
    stage = replace(mlp_stage(1.0), precision="fp16")
    with pytest.raises(CheckFailed, match=r"graph mlp: node .* \((Gemm|MatMul) in first\) computes in FLOAT, expected"):
        export_stages([stage], tmp_path)


@pytest.mark.parametrize("precision", list(CAST_DTYPES))
def test_norms_and_softmax_stay_float32_in_every_far_stage(tiny: Any, precision: str) -> None:
    """The modules, before they are exported: weights of norms and the solver's state."""
    for stage in cast_stages(stages_of(tiny), precision):
        for name, parameter in stage.module.named_parameters():
            norm = any("norm" in part or part.endswith("_ln") for part in name.split("."))
            assert parameter.dtype == (torch.float32 if norm else CAST_DTYPES[precision]), name
        assert stage.precision == precision
        assert stage.tolerance == max(stage_tolerance(stage, precision), stage.tolerance)


def test_float32_stages_are_not_changed_by_islands(tiny: Any) -> None:
    """The graph of a float32 stage has no cast between floats."""
    for graph in open_bundle(tiny.bundle).manifest.graphs:
        model = ir.load(tiny.bundle / graph.file)
        for node in model.graph:
            if node.op_type == "Cast":
                assert node.attributes["to"].as_int() not in (HALF, onnx.TensorProto.BFLOAT16)


def test_a_free_run_is_judged_where_it_can_be() -> None:
    assert free_run_limits("fp32", False, 1e-4, 1) == (pytest.approx(1e-3), pytest.approx(40))
    assert free_run_limits("fp16", False, 1e-2, 1)[1] == 35
    assert free_run_limits("bf16", False, 5e-2, 1)[1] == 28
    assert free_run_limits("fp16", False, 1e-1, 10)[1] == pytest.approx(15)
    assert free_run_limits("fp16", True, 1e-2, 1) == (math.inf, -math.inf)
    assert free_run_limits("int8", False, 0.3, 1) == (math.inf, -math.inf)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precision": "fp8"}, "unknown; known: fp32, fp16, bf16, int8"),
        ({"calibrate": 4}, "only int8 is calibrated"),
        ({"verify_steps": "3"}, "an fp32 export draws no picture to verify"),
        ({"precision": "fp16", "verify_steps": "none"}, "steps"),
    ],
)
def test_what_does_not_fit_together_is_refused_at_once(
    tiny: Any, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(FarError, match=said):
        export_bundle(tiny.safetensors, tiny.vae, tmp_path / "b", **options)
    assert not (tmp_path / "b").exists()


def test_the_reference_computes_in_float32_whatever_was_cast(tiny: Any) -> None:
    """Casting changes the modules in place: verify loads the checkpoint again."""
    first = stages_of(tiny)
    again = TorchEngine(stages_of(tiny))
    cast_stages(first, "fp16")
    latents = again.put(np.zeros((1, 16, 4), np.float32))
    assert again.get(again.run("decode", {"latents": latents})["pixels"]).dtype == np.uint8
    assert all(p.dtype == torch.float32 for stage in again._stages for p in stage.module.parameters())
