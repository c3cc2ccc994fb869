"""Building engines: shapes, options, reports, precisions; and for real with TensorRT-RTX, without a GPU."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from far_runtime.bundle import open_bundle
from far_runtime.engines.cache.store import EngineCache
from far_runtime.engines.tensorrt.builder import build as builder
from far_runtime.engines.tensorrt.builder.build import build_engines, engine_key
from far_runtime.engines.tensorrt.builder.log import errors, memory_figures
from far_runtime.engines.tensorrt.builder.options import (
    NOT_IN_RTX,
    PROFILES,
    BuildOptions,
    capability,
    check_options,
)
from far_runtime.engines.tensorrt.builder.precision import MatMul, compare, inspected, missing
from far_runtime.engines.tensorrt.builder.profiles import graph_profiles
from far_runtime.errors import FarError
from far_runtime.machine.gpu import Gpu, find_gpu

GPU = Gpu("NVIDIA RTX 4090", "8.9")


def rtx() -> None:
    pytest.importorskip("polygraphy")
    try:
        import tensorrt_rtx
    except (ImportError, OSError):
        pytest.skip("tensorrt_rtx is not there: it has wheels for x86-64 only")
    assert tensorrt_rtx.__version__


def test_a_graph_has_the_exported_shapes(tiny: Any) -> None:
    (shapes,) = graph_profiles(open_bundle(tiny.bundle), None, 1)["denoise"]
    assert shapes["state"] == ((1, 16, 4), (4, 16, 4), (64, 16, 4))
    assert shapes["condition"] == ((1, 16, 32), (8, 16, 32), (128, 16, 32))
    assert set(shapes) == {"state", "condition", "guidance", "noise", "history"}  # the others have no dynamic axis


def test_batch_sets_pictures_and_rows_with_and_without_guidance(tiny: Any) -> None:
    profiles = graph_profiles(open_bundle(tiny.bundle), (2, 4, 8), 1)
    assert profiles["denoise"][0]["state"] == ((2, 16, 4), (4, 16, 4), (8, 16, 4))
    assert profiles["denoise"][0]["condition"] == ((1, 16, 32), (8, 16, 32), (16, 16, 32))
    assert profiles["decode"][0]["latents"] == ((2, 16, 4), (4, 16, 4), (8, 16, 4))


def test_token_counts_have_a_profile_per_step_and_one_for_all_else(tiny: Any) -> None:
    profiles = graph_profiles(open_bundle(tiny.mar_bundle), (1, 1, 1), PROFILES["tensorrt"])
    tokens = [shapes["condition"][0][1] for shapes in profiles["denoise"]]
    assert tokens == [2, 3, 5, 6, 1]  # the steps of the schedule, then the whole range
    *steps, whole = profiles["transformer"]
    assert [shapes["visible"] for shapes in steps] == [((1, n),) * 3 for n in (0, 2, 5, 10)]
    assert whole["visible"] == ((1, 0), (1, 8), (1, 15))
    assert len(profiles["decode"]) == 1


def test_more_steps_than_profiles_share_them(tiny: Any) -> None:
    profiles = graph_profiles(open_bundle(tiny.mar_bundle), (1, 1, 1), 3)
    assert [shapes["visible"] for shapes in profiles["transformer"]] == [
        ((1, 0), (1, 2), (1, 2)), ((1, 5), (1, 10), (1, 10)), ((1, 0), (1, 8), (1, 15)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("library", "options", "said"),
    [
        ("tensorrt-rtx", BuildOptions(targets=("89",)), "target 89: expected compute capabilities such as sm86"),
        ("tensorrt", BuildOptions(targets=("sm89",)), "target: TensorRT builds for the GPU that it runs on"),
        ("tensorrt", BuildOptions(batch=(4, 2, 8)), "batch 4:2:8: expected 1 <= smallest"),
        ("tensorrt", BuildOptions(batch=(0, 2, 8)), "batch 0:2:8: expected 1 <= smallest"),
        (
            "tensorrt",
            BuildOptions(stripped=True, refittable=True),
            "weight_stripped: is refittable already; leave refittable out",
        ),
        ("onnxruntime", BuildOptions(), "is not built ahead"),
        ("tensorrt-rtx", BuildOptions(optimization_level=0), "optimization_level: TensorRT-RTX takes it"),
        (
            "tensorrt-rtx",
            BuildOptions(version_compatible=True),
            "version_compatible: TensorRT-RTX has no lean runtime; leave it out, or build with engine tensorrt",
        ),
        (
            "tensorrt-rtx",
            BuildOptions(hardware_compatible="ampere+"),
            "hardware_compatible: .* in its place, target; leave it out",
        ),
        ("tensorrt-rtx", BuildOptions(timing_cache=Path("x")), "timing_cache: TensorRT-RTX times nothing"),
    ],
)
def test_options_that_cannot_be_are_refused(library: str, options: BuildOptions, said: str) -> None:
    with pytest.raises(FarError, match=said.replace("(", r"\(")):
        check_options(library, options)


def test_what_tensorrt_rtx_lacks_is_an_option_of_tensorrt() -> None:
    assert set(NOT_IN_RTX) <= set(vars(BuildOptions()))
    check_options("tensorrt", BuildOptions(optimization_level=5, version_compatible=True, refittable=True))


def key(bundle: Any, library: str, options: BuildOptions, gpu: Gpu | None = None) -> Any:
    return engine_key(bundle, library, "1.7", options, gpu, graph_profiles(bundle, options.batch, 1))


def test_every_option_that_changes_the_engine_changes_its_key(tiny: Any) -> None:
    bundle = open_bundle(tiny.bundle)
    changes: list[dict[str, Any]] = [
        {}, {"batch": (1, 1, 1)}, {"workspace": 64}, {"workspace": 65}, {"optimization_level": 0},
        {"optimization_level": 5}, {"version_compatible": True}, {"hardware_compatible": "ampere+"},
        {"hardware_compatible": "same-cc"}, {"refittable": True}, {"stripped": True}, {"weight_streaming": True},
    ]  # fmt: skip
    keys = [key(bundle, "tensorrt", BuildOptions(**change), GPU).digest for change in changes]
    assert len(set(keys)) == len(changes)
    assert key(bundle, "tensorrt", BuildOptions(timing_cache=Path("x")), GPU).digest == keys[0]
    assert key(bundle, "tensorrt", BuildOptions(), Gpu("Orin", "8.7")).digest != keys[0]
    two = key(bundle, "tensorrt-rtx", BuildOptions(targets=("sm120", "sm89")))
    assert two.facts["targets"] == ["sm89", "sm120"]
    assert two.digest == key(bundle, "tensorrt-rtx", BuildOptions(targets=("sm89", "sm120", "sm89"))).digest
    assert key(bundle, "tensorrt-rtx", BuildOptions(), GPU).facts["targets"] == ["sm89"]
    assert capability("sm89") == (8, 9) and capability("sm120") == (12, 0)


def test_without_a_gpu_the_error_says_what_to_give(tiny: Any) -> None:
    bundle = open_bundle(tiny.bundle)
    for library, options, said in (
        ("tensorrt", BuildOptions(), "use engine tensorrt-rtx target sm89"),
        ("tensorrt-rtx", BuildOptions(), "give target"),
        ("tensorrt-rtx", BuildOptions(targets=("sm89",), refittable=True), "on a GPU only"),
        ("tensorrt-rtx", BuildOptions(targets=("sm89",), stripped=True), "on a GPU only"),
    ):
        with pytest.raises(FarError, match=said):
            key(bundle, library, options)


def test_a_builders_log_gives_memory_and_errors() -> None:
    log = [
        "[V] Total Activation Memory: 10 bytes", "[V] Total Activation Memory: 10776576 bytes",
        "[V] Total Weights Memory: 119872 bytes", "[V] Max Scratch Memory: 7 bytes", "[W] Error Code is no code",
        *["[E] IBuilder::build: Error Code 1: Myelin (no tactics)"] * 2,
    ]  # fmt: skip
    assert memory_figures(log) == {"activation": 10776576, "weights": 119872, "scratch": 7}
    assert errors(log) == ["IBuilder::build: Error Code 1: Myelin (no tactics)"]
    assert memory_figures([]) == {} and errors([]) == []


def test_a_network_without_products_of_its_precision_is_refused() -> None:
    wide = [MatMul("a", "fp32"), MatMul("b", "fp32")]
    assert missing(wide, "fp32") == "" and missing([], "fp16") == ""
    narrow = [MatMul(name, "fp16") for name in "cde"]
    assert missing([*wide, *narrow], "fp16") == ""
    assert missing([*wide, narrow[0]], "fp16"), "mostly FP32 behind the name of FP16"
    assert missing([*wide, MatMul("c", "int8")], "int8") == ""
    assert missing(wide, "fp16").startswith("the manifest says fp16, but its 2 matrix products are fp32")


def layer(metadata: str, *formats: str, word: str = "Format/Datatype") -> dict[str, Any]:
    return {"Name": "x", "Metadata": metadata, "Inputs": [{word: text} for text in formats], "Outputs": []}


def test_an_engine_that_fell_back_to_fp32_is_refused() -> None:
    wanted = [MatMul("/a/MatMul", "fp16"), MatMul("/b/MatMul", "int8"), MatMul("/c/MatMul", "fp32")]

    def verdict(*layers: dict[str, Any]) -> str:
        return compare(wanted, inspected(json.dumps({"Layers": list(layers)})))

    a, b = "[ONNX Layer: /a/MatMul]\x1e[ONNX Layer: /a/Add]", "[ONNX Layer: /b/MatMul]"
    sound = [layer(a, "Half", "Half"), layer(b, "Row major linear INT8 format", "Float")]
    assert verdict(*sound) == ""
    assert verdict(*sound, layer(a, "Float")) == ""  # a reformat beside it
    fell = verdict(layer(a, "Row major linear FP32", word="Datatype"), sound[1])
    assert "fell back: /a/MatMul (fp16)" in fell and "/b" not in fell
    assert "fell back: /b/MatMul (int8)" in verdict(sound[0], layer(b, "Half"))
    assert "tells nothing" in verdict(layer("", "Float")) and "tells nothing" in compare(wanted, [])
    assert compare([MatMul("/c/MatMul", "fp32")], []) == ""


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Any) -> Any:
    """Copies bundles with a user's cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))

    def copy(name: str) -> Path:
        return Path(shutil.copytree(getattr(tiny, name), tmp_path / name, ignore=shutil.ignore_patterns("engines")))

    return copy


def test_tensorrt_rtx_builds_every_stage_for_three_gpus_without_any(cached: Any) -> None:
    rtx()
    bundle = open_bundle(cached("bundle"))
    lines: list[str] = []
    engine = build_engines(bundle, "tensorrt-rtx", BuildOptions(targets=("sm86", "sm89", "sm120")), lines.append)
    assert [line.split()[1] for line in lines] == [f"{graph.name}:" for graph in bundle.manifest.graphs]
    for graph in bundle.manifest.graphs:
        notes = engine.notes[graph.name]
        assert engine.file(graph.name).suffix == ".plan" and len(engine.read(graph.name)) == notes["plan"] > 1000
        assert {"activation", "weights", "seconds", "peak"} <= set(notes)
    assert engine.notes["denoise"]["products"] == {"fp32": 11}
    assert "Setting 3 target compute capabilities" in (engine.path / builder.LOG).read_text()
    assert EngineCache(bundle).find(key_of(engine)) == engine
    again: list[str] = []
    assert (
        build_engines(bundle, "tensorrt-rtx", BuildOptions(targets=("sm120", "sm86", "sm89")), again.append) == engine
    )
    assert again == [f"{engine.path}: built already"]


def key_of(engine: Any) -> Any:
    from far_runtime.engines.cache.entry import EngineKey

    return EngineKey(engine.library, engine.facts)


def first(bundle: Any, name: str = "place") -> Any:
    """The bundle with a graph that is built before the others."""
    graphs = tuple(sorted(bundle.manifest.graphs, key=lambda graph: graph.name != name))
    return replace(bundle, manifest=replace(bundle.manifest, graphs=graphs))


def test_an_unknown_gpu_is_named_with_the_known_ones(cached: Any) -> None:
    rtx()
    bundle = first(open_bundle(cached("bundle")))
    with pytest.raises(FarError, match=r"target sm33: not known to tensorrt-rtx .*, which builds for .*sm89"):
        build_engines(bundle, "tensorrt-rtx", BuildOptions(targets=("sm33",)))


def test_a_workspace_that_is_too_small_is_an_error_with_the_builders_words(cached: Any) -> None:
    rtx()
    bundle = first(open_bundle(cached("bundle")), "denoise")
    with pytest.raises(FarError) as caught:
        build_engines(bundle, "tensorrt-rtx", BuildOptions(targets=("sm89",), workspace=1))
    said = str(caught.value)
    assert list(EngineCache(bundle).places[0].iterdir()) == []
    assert "graph denoise: tensorrt-rtx does not build it" in said and "workspace" in said
    log = Path(said.rpartition("(log: ")[2].rstrip(")"))
    assert "Parse" in log.read_text() or "Building" in log.read_text()


def test_a_file_that_is_no_graph_is_an_error(cached: Any) -> None:
    rtx()
    bundle = open_bundle(cached("bundle"))
    (bundle.path / "place.onnx").write_bytes(b"nothing")
    with pytest.raises(FarError, match="graph place: tensorrt-rtx does not build it"):
        build_engines(first(bundle), "tensorrt-rtx", BuildOptions(targets=("sm89",)))


def test_a_graph_of_another_precision_than_the_manifest_says_is_refused(cached: Any) -> None:
    rtx()
    bundle = first(open_bundle(cached("bundle")), "denoise")
    graph, *others = bundle.manifest.graphs
    graphs = (replace(graph, precision="fp16"), *others)
    claimed = replace(bundle, manifest=replace(bundle.manifest, graphs=graphs))
    with pytest.raises(FarError, match="the manifest says fp16, but its 11 matrix products are fp32"):
        build_engines(claimed, "tensorrt-rtx", BuildOptions(targets=("sm89",)))


@pytest.mark.skipif(sys.platform == "win32", reason="no signals")
@pytest.mark.parametrize(("number", "said"), [(signal.SIGKILL, "want of memory"), (signal.SIGSEGV, "crashed")])
def test_a_builder_that_is_killed_or_crashes_is_an_error_that_says_so(
    cached: Any, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    rtx()
    bundle = first(open_bundle(cached("bundle")))
    start = builder.subprocess.Popen

    def dies(command: list[str], **options: Any) -> Any:
        return start([sys.executable, "-c", f"import os; os.kill(os.getpid(), {int(number)})"], **options)

    monkeypatch.setattr(builder.subprocess, "Popen", dies)
    with pytest.raises(FarError, match=said):
        build_engines(bundle, "tensorrt-rtx", BuildOptions(targets=("sm89",)))
    assert EngineCache(bundle).entries() == [] and list(EngineCache(bundle).places[0].iterdir()) == []


@pytest.mark.skipif(find_gpu() is not None, reason="has a GPU")
def test_the_command_builds_lists_and_cleans(far: Any, cached: Any) -> None:
    rtx()
    folder = cached("bundle")
    assert far("build", folder).code == 2
    refused = far("build", folder, "--engine", "tensorrt-rtx")
    assert refused.code == 2 and "give --target" in refused.err
    assert "--target: only tensorrt" in far("build", folder, "--engine", "onnxruntime", "--target", "sm89").err
    assert "as 1:4:8" in far("build", folder, "--engine", "tensorrt-rtx", "--batch", "4").err

    assert far("clean", folder).out == "nothing to remove\n"
    made = far("build", folder, "--engine", "tensorrt-rtx", "--target", "sm89", "--batch", "1:1:2")
    assert made.code == 0, made.err
    assert "1/5 transformer: " in made.out and "activation" in made.out
    (engine,) = json.loads(far("inspect", folder, "--json").out)["engines"]
    assert (engine["precision"], engine["device"]) == ("fp32", "sm89")
    assert engine["misfit"] == "for sm89; no NVIDIA GPU here"
    table = far("inspect", folder).out
    assert engine["name"] in table and "for sm89; no NVIDIA GPU here" in " ".join(table.split())
    drawn = far("generate", folder, "--label", "1", "--engine", "tensorrt-rtx", "-o", "a.png")
    assert drawn.code == 2

    assert far("clean", folder).out == "nothing to remove\n"  # it fits elsewhere
    assert "no engine of" in far("clean", folder, "nothing").err
    assert far("clean", folder, "--all", "--stale").code == 2
    would = far("clean", folder, engine["name"], "--dry-run").out
    assert would.startswith(f"would remove {engine['name']}, ") and "would be freed" in would
    plan = Path(engine["path"]) / "denoise.plan"
    plan.write_bytes(plan.read_bytes()[:-1])
    assert "damaged: denoise.plan" in " ".join(far("inspect", folder).out.split())
    gone = far("clean", folder).out
    assert gone.startswith(f"removed {engine['name']}, ") and "damaged" in gone and gone.endswith(" MB freed\n")
    assert not os.path.exists(engine["path"])
