"""`far export-triton`: what is written, that it is whole or not there, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format

from far_runtime.bundle import open_bundle, read_manifest, sha256_of, write_manifest
from far_runtime.engines.cache.compatibility import RECIPE
from far_runtime.engines.cache.entry import CachedEngine, EngineKey, bundle_facts
from far_runtime.engines.cache.store import EngineCache
from far_runtime.triton import repository
from far_runtime.triton.config import to_text
from simulated_triton import schema

Far = Callable[..., Any]


def config_of(model: Path) -> Any:
    """A model's configuration, by Triton's schema."""
    return text_format.Parse((model / "config.pbtxt").read_text(encoding="utf-8"), schema().ModelConfig())


def test_the_folder_is_laid_out_as_triton_wants_it(tiny: Any, far: Far, tmp_path: Path) -> None:
    result = far("export-triton", tiny.bundle, "-o", "models", "--name", "emoji", "--no-runtime")
    assert result.code == 0, result.err
    files = sorted(str(path.relative_to(tmp_path / "models")) for path in Path("models").absolute().rglob("*.*"))
    stages = [f"emoji_{name}" for name in ("decode", "denoise", "place", "transformer")]
    weights = [f"{name}/1/weights.bin" for name in stages if name != "emoji_place"]
    assert files == sorted([
        *(f"{name}/config.pbtxt" for name in ("emoji", *stages)), *(f"{name}/1/model.onnx" for name in stages),
        *weights, "emoji/1/model.py", "emoji/1/manifest.json",
    ])  # fmt: skip
    assert result.out.splitlines()[1:] == [
        "models: 4 stages and the loop emoji, which draws up to 8 pictures at once",
        f"next: tritonserver --model-repository {tmp_path / 'models'}, and ask for emoji",
    ]
    assert far("export-triton", tiny.bundle, "-o", "more", "--editing").code == 0
    assert sorted(path.name for path in Path("more").iterdir())[:3] == ["bundle", "bundle_decode", "bundle_denoise"]
    assert Path("more/bundle_encode/1/model.onnx").is_file()
    assert Path("more").stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_weights_are_there_once_unless_copies_are_wanted(tiny: Any, far: Far, monkeypatch: Any) -> None:
    def numbers(folder: str) -> set[int]:
        files = list(Path(folder).rglob("weights.bin"))
        assert {sha256_of(path) for path in files} == {sha256_of(tiny.bundle / "weights.bin")}
        assert not any(path.is_symlink() for path in files)
        return {path.stat().st_ino for path in files}

    result = far("export-triton", tiny.bundle, "-o", "links").out
    assert re.match(r"\d\.\d MB of models written, \d\.\d MB more as hard links\n", result)
    assert len(numbers("links")) == 1
    assert (tiny.bundle / "weights.bin").stat().st_nlink == 1  # onnx refuses weights with two names
    assert "links" not in far("export-triton", tiny.bundle, "-o", "copies", "--copy").out.splitlines()[0]
    assert len(numbers("copies")) == 3

    def no_links(source: Path, target: Path) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(repository.os, "link", no_links)
    assert far("export-triton", tiny.bundle, "-o", "elsewhere").code == 0
    assert len(numbers("elsewhere")) == 3


def test_the_loops_inputs_are_those_of_its_system(tiny: Any, far: Far) -> None:
    far("export-triton", tiny.t2i_bundle, "-o", "models", "--name", "t", "--max-batch", 999, "--max-wait", 2.5,
        "--queue", 7, "--loops", 2, "--environment", "/env/far é.tar.gz")  # fmt: skip
    config = config_of(Path("models/t"))
    assert [(io.name, io.optional) for io in config.input] == [
        ("PROMPT", False), ("SEED", True), ("SAMPLING", True), ("NEGATIVE", True)
    ]  # fmt: skip
    assert config.max_batch_size == 64  # what the graphs were exported for
    assert config.dynamic_batching.max_queue_delay_microseconds == 2500
    assert config.dynamic_batching.default_queue_policy.max_queue_size == 7
    assert config.instance_group[0].count == 2
    assert config.parameters["EXECUTION_ENV_PATH"].string_value == "/env/far é.tar.gz"
    assert Path("models/t/1/tokenizer.json").read_bytes() == (tiny.t2i_bundle / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("engine", "kind", "accelerators"),
    [
        ("onnxruntime", "KIND_CPU", []),
        ("onnxruntime:openvino", "KIND_CPU", ["openvino"]),
        ("onnxruntime:cuda", "KIND_GPU", ["cuda"]),
        ("onnxruntime:tensorrt", "KIND_GPU", ["tensorrt", "cuda"]),
    ],
)
def test_engines_become_instance_groups_and_accelerators(
    tiny: Any, far: Far, engine: str, kind: str, accelerators: list[str]
) -> None:
    on_gpu = kind == "KIND_GPU"
    options = ["--gpu", 1, "--gpu", 3, "--tensors", "device"] if on_gpu else ["--threads", 2]
    result = far("export-triton", tiny.bundle, "-o", "m", "--name", "m", "--engine", engine, "--instances", 2, *options)
    assert result.code == 0, result.err
    config = config_of(Path("m/m_transformer"))
    (group,) = config.instance_group
    assert schema().ModelInstanceGroup.Kind.Name(group.kind) == kind
    assert (group.count, list(group.gpus)) == (2, [1, 3] if on_gpu else [])
    assert ("intra_op_thread_count" in config.parameters) == (not on_gpu)
    chosen = config.optimization.execution_accelerators
    both = [*chosen.gpu_execution_accelerator, *chosen.cpu_execution_accelerator]
    assert [one.name for one in both] == accelerators
    assert len(chosen.gpu_execution_accelerator) == (len(accelerators) if on_gpu else 0)
    if "tensorrt" in accelerators:
        assert both[0].parameters["trt_profile_min_shapes"].startswith("latents:1x16x4,labels:1")
    assert config_of(Path("m/m")).parameters["TENSORS"].string_value == ("device" if on_gpu else "host")


def test_text_format_keeps_every_character() -> None:
    config = schema().ModelConfig()
    text = 'a "quoted" \\ name\n\té 絵'
    message = {"name": text, "parameters": [{"key": "k", "value": {"string_value": text}}], "max_batch_size": 3}
    text_format.Parse(to_text(message), config)
    assert (config.name, config.parameters["k"].string_value, config.max_batch_size) == (text, text, 3)


def built(bundle_path: Path, profiles: list[str], **flags: Any) -> CachedEngine:
    """An engine of TensorRT in the bundle's cache, of invented engine files. profiles: sizes of the batch, as 1:4:8."""
    bundle = open_bundle(bundle_path)
    shapes = {
        graph.name: [
            {
                spec.name: ":".join("x".join([size, *map(str, spec.shape[1:])]) for size in one.split(":"))
                for spec in graph.inputs
                if spec.shape[0] == "batch"
            }
            for one in profiles
        ]
        for graph in bundle.manifest.graphs
    }
    facts = {
        **bundle_facts(bundle), "version": "10.13.3", "recipe": RECIPE, "flags": flags, "shapes": shapes,
        "device": "NVIDIA L4", "compute_capability": "8.9",
    }  # fmt: skip

    def write(folder: Path) -> None:
        for graph in bundle.manifest.graphs:
            (folder / f"{graph.name}.plan").write_bytes(f"plan of {graph.name}".encode())

    return EngineCache(bundle).build(EngineKey("tensorrt", facts), write)


def test_plans_of_far_build_become_models(bundle_copy: Path, far: Far) -> None:
    engine = built(bundle_copy, ["1:2:4", "1:2:6"], version_compatible=True)
    result = far("export-triton", bundle_copy, "-o", "m", "--name", "m", "--engine", "tensorrt", "--max-batch", 32)
    assert result.code == 0, result.err
    assert result.out.splitlines()[0] == (
        f"plans of {engine.name}: for NVIDIA L4 (8.9), TensorRT 10.13.3 or later, with "
        "--backend-config=tensorrt,version-compatible=true"
    )
    config = config_of(Path("m/m_denoise"))
    assert (config.platform, config.backend) == ("tensorrt_plan", "tensorrt")
    assert list(config.instance_group[0].profile) == ["0", "1"]
    assert Path("m/m_denoise/1/model.plan").read_bytes() == b"plan of denoise"
    assert not list(Path("m").rglob("*.onnx")) + list(Path("m").rglob("weights.bin"))
    assert config_of(Path("m/m")).max_batch_size == 6

    other = built(bundle_copy, ["1:1:1"])
    assert far("export-triton", bundle_copy, "-o", "new", "--engine", "tensorrt").out.startswith(
        f"plans of {other.name}"
    )
    named = far("export-triton", bundle_copy, "-o", "old", "--engine", "tensorrt", "--plans", engine.name)
    assert named.out.startswith(f"plans of {engine.name}")
    (engine.path / "decode.plan").write_bytes(b"plan of decodE")
    damaged = far("export-triton", bundle_copy, "-o", "bad", "--engine", "tensorrt", "--plans", engine.name)
    assert damaged.code == 2
    assert "decode.plan was changed" in damaged.err
    assert not Path("bad").exists()


@pytest.mark.parametrize(
    ("profiles", "flags", "message"),
    [
        (
            [],
            None,
            "no tensorrt engine to serve (none was built); build one on the GPU that will serve with: far build",
        ),
        (["2:4:8"], {}, "built for 2 to 8 pictures, and a request may come alone"),
        (["1:4:8"], {"stripped": True}, "its engine files are without weights"),
    ],
)
def test_plans_that_triton_cannot_run(
    bundle_copy: Path, far: Far, profiles: list[str], flags: dict[str, Any] | None, message: str
) -> None:
    if flags is not None:
        built(bundle_copy, profiles, **flags)
    result = far("export-triton", bundle_copy, "-o", "m", "--engine", "tensorrt")
    assert result.code == 2
    assert message in result.err
    assert not Path("m").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "openvino"], "engine 'openvino': Triton runs onnxruntime, onnxruntime:openvino,"),
        (["--engine", "tensorrt-rtx"], "engine 'tensorrt-rtx': Triton runs"),
        (["--name", "a/b"], "'a/b' cannot be a model's name"),
        (["--gpu", "0"], "--gpu: onnxruntime runs on the CPU"),
        (["--tensors", "device"], "--tensors device: onnxruntime runs on the CPU"),
        (["--engine", "onnxruntime:cuda", "--threads", "2"], "--threads: onnxruntime:cuda runs on a GPU"),
        (["--plans", "x"], "--plans: only --engine tensorrt"),
        (["--engine", "tensorrt", "--plans", "x"], "no tensorrt engine x to serve"),
        (["--max-batch", "0"], "--max-batch"),
    ],
)
def test_options_that_cannot_be(tiny: Any, far: Far, options: list[str], message: str) -> None:
    result = far("export-triton", tiny.bundle, "-o", "m", *options)
    assert result.code == 2
    assert message in result.err
    assert len(result.err.splitlines()) == 1
    assert not Path("m").exists()


def test_no_bundle_and_no_kernels_are_errors(bundle_copy: Path, far: Far, tmp_path: Path) -> None:
    assert "no such bundle" in far("export-triton", "nothing", "-o", "m").err
    manifest = read_manifest(bundle_copy)
    write_manifest(bundle_copy, type(manifest)(**{**manifest.__dict__, "precision": "bf16"}))
    refused = far("export-triton", bundle_copy, "-o", "m")
    assert refused.code == 2
    assert "is in BF16, for which onnxruntime has no kernels on the CPU" in refused.err
    assert far("export-triton", bundle_copy, "-o", "m", "--engine", "onnxruntime:cuda").code == 0


def test_int8_on_the_cpu_comes_with_a_warning(bundle_copy: Path, far: Far) -> None:
    warning = "warning: on x86-64 without VNNI, sums of INT8 products overflow"
    assert warning not in far("export-triton", bundle_copy, "-o", "fp32").out
    write_manifest(bundle_copy, replace(read_manifest(bundle_copy), precision="int8"))
    for engine in ("onnxruntime", "onnxruntime:openvino"):
        result = far("export-triton", bundle_copy, "-o", engine.replace(":", "-"), "--engine", engine)
        assert (result.code, warning in result.out) == (0, True)
    assert warning not in far("export-triton", bundle_copy, "-o", "cuda", "--engine", "onnxruntime:cuda").out


def test_without_a_batch_in_any_profile_pictures_are_drawn_one_by_one(bundle_copy: Path, far: Far) -> None:
    manifest = read_manifest(bundle_copy)
    assert manifest.largest_batch == 64
    write_manifest(bundle_copy, replace(manifest, graphs=tuple(replace(one, profile={}) for one in manifest.graphs)))
    result = far("export-triton", bundle_copy, "-o", "m", "--name", "one")
    assert result.code == 0
    assert config_of(Path("m/one")).max_batch_size == 1


def test_a_folder_that_is_there_stays(tiny: Any, far: Far, tmp_path: Path) -> None:
    (tmp_path / "m" / "other").mkdir(parents=True)
    (tmp_path / "file").write_text("mine")
    for target in ("m", "file"):
        result = far("export-triton", tiny.bundle, "-o", target)
        assert result.code == 2
        assert f"{target}: is there already, and stays" in result.err
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["other"]
    (tmp_path / "empty").mkdir()
    assert far("export-triton", tiny.bundle, "-o", "empty").code == 0
    assert far("export-triton", tiny.bundle, "-o", "file/m").code == 2


def test_a_full_disk_leaves_nothing(tiny: Any, far: Far, tmp_path: Path, monkeypatch: Any) -> None:
    copy = shutil.copyfile

    def full(source: Path, target: Path) -> None:
        if Path(target).name == "manifest.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        copy(source, target)

    monkeypatch.setattr(repository.shutil, "copyfile", full)
    result = far("export-triton", tiny.bundle, "-o", "m", "--copy")
    assert result.code == 2
    assert "the disk is full after 1 MB; free some space, or name another folder with -o" in result.err
    assert list(tmp_path.iterdir()) == []


SLOW = """
import sys, time
from far_runtime.triton import repository
put = repository.ModelFiles.put
def slow(self, source, target):
    put(self, source, target)
    print("put", flush=True)
    time.sleep(60)
repository.ModelFiles.put = slow
from far_runtime.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_export_leaves_nothing_that_lasts(tiny: Any, far: Far, tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-c", SLOW, "export-triton", str(tiny.bundle), "-o", str(tmp_path / "m")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "put\n":
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        process.wait()
    assert not (tmp_path / "m").exists()
    assert len(list(tmp_path.iterdir())) == (1 if number == signal.SIGKILL else 0)
    assert far("export-triton", tiny.bundle, "-o", "m").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


ALONE = """
import json, sys, types
version, config = sys.argv[1:]

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("click", "rich", "PIL", "onnxruntime", "openvino", "torch", "onnx", "tokenizers"):
            raise ImportError(name)

sys.meta_path.insert(0, Nothing())
sys.path = [path for path in sys.path if "far" not in path or "site-packages" in path] + [version]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
utils = sys.modules["triton_python_backend_utils"] = types.ModuleType("triton_python_backend_utils")
utils.TritonModelException = RuntimeError
import model
import far_runtime
assert far_runtime.__file__.startswith(version), far_runtime.__file__
loop = model.TritonPythonModel()
folder = version.rpartition("/")[0]
loop.initialize({"model_config": config, "model_repository": folder, "model_version": "1", "model_name": "m"})
print(loop._pipeline.engine.name)
"""


def test_the_loop_starts_with_numpy_and_its_copy_of_far_runtime_alone(tiny: Any, far: Far, tmp_path: Path) -> None:
    assert far("export-triton", tiny.bundle, "-o", "m", "--name", "m").code == 0
    version = tmp_path / "m" / "m" / "1"
    copied = {path.name for path in (version / "far_runtime").rglob("*")}
    assert copied.isdisjoint({"serve", "sample", "bench", "builder", "cli", "__pycache__"})
    assert {"sampling", "pipeline.py", "handler.py"} <= copied
    values = {"STAGES": "m", "ENGINE": "onnxruntime", "TENSORS": "host"}
    config = json.dumps({"parameters": {key: {"string_value": value} for key, value in values.items()}})
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", ALONE, str(version), config]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "triton:onnxruntime"
