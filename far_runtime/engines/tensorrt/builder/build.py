"""`far build` for TensorRT and TensorRT-RTX: every graph of a bundle into one folder of the engine cache."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import far_runtime
from far_runtime.bundle import Bundle, Graph
from far_runtime.engines.cache.compatibility import EXTRAS, MODULES, RECIPE, library_version
from far_runtime.engines.cache.entry import CachedEngine, EngineKey, bundle_facts
from far_runtime.engines.cache.store import EngineCache
from far_runtime.engines.tensorrt.builder.log import errors, memory_figures
from far_runtime.engines.tensorrt.builder.options import PROFILES, BuildOptions, capability, check_options
from far_runtime.engines.tensorrt.builder.profiles import Shapes, graph_profiles
from far_runtime.errors import FarError, SettingName
from far_runtime.machine.gpu import Gpu, find_gpu
from far_runtime.storage.atomic import user_cache

LOG = "build.txt"
LIBRARY_VARIABLE = "POLYGRAPHY_USE_TENSORRT_RTX"

Report = Callable[[str], None]


def build_engines(
    bundle: Bundle, library: str, options: BuildOptions | None = None, report: Report = lambda line: None
) -> CachedEngine:
    """Build the engines of a bundle's graphs with "tensorrt" or "tensorrt-rtx", unless the cache has them already.

    TensorRT builds for the GPU of this machine, TensorRT-RTX for options.targets, or else for the GPU of this machine.
    report: called with a line of text for every graph.
    Raises FarError for options that the library does not take, a missing library, a graph that it does not build, an
    engine that computes in a wider precision than its graph, and a build that ran out of memory or disk.
    """
    options = options or BuildOptions()
    check_options(library, options)
    version = check_library(library)
    gpu = find_gpu()
    profiles = graph_profiles(bundle, options.batch, options.profiles or PROFILES[library])
    key = engine_key(bundle, library, version, options, gpu, profiles)
    cache = EngineCache(bundle, report)
    engine = cache.find(key)
    if engine is not None:
        report(f"{engine.path}: built already")
        return engine
    timing = None if library == "tensorrt-rtx" else options.timing_cache or default_timing_cache(version, gpu)

    def write(folder: Path) -> Mapping[str, Any]:
        notes = {}
        for i, graph in enumerate(bundle.manifest.graphs, 1):
            job = {
                "library": library, "name": graph.name, "precision": graph.precision,
                "onnx": str(bundle.path.resolve() / graph.file),
                "engine_file": str(folder.resolve() / f"{graph.name}.plan"),
                "profiles": [shapes for shapes in profiles[graph.name] if shapes], "flags": options.flags(),
                "targets": [capability(target) for target in key.facts.get("targets", ())],
                "timing_cache": timing and str(timing),
            }  # fmt: skip
            notes[graph.name] = build_graph(graph, job, folder)
            report(f"{i}/{len(bundle.manifest.graphs)} {build_line(graph.name, notes[graph.name])}")
        return notes

    return cache.build(key, write)


def check_library(library: str) -> str:
    """Version of the installed library; FarError where it or Polygraphy is missing."""
    version = library_version(library)
    if not version or find_spec(MODULES[library]) is None:
        where = (
            "for x86-64 with Linux or Windows" if library == "tensorrt-rtx" else
            "on Jetson it comes with the system: make the virtual environment with --system-site-packages"
        )  # fmt: skip
        raise FarError(
            f"{library} is not installed; install it with: pip install 'far-deploy[{EXTRAS[library]}]' ({where})"
        )
    if find_spec("polygraphy") is None:
        raise FarError(f"polygraphy is not installed; install it with: pip install 'far-deploy[{EXTRAS[library]}]'")
    return version


def engine_key(
    bundle: Bundle,
    library: str,
    version: str,
    options: BuildOptions,
    gpu: Gpu | None,
    profiles: Mapping[str, Sequence[Shapes]],
) -> EngineKey:
    """The cache key of a bundle's engines; FarError where there is no GPU to build for."""
    build = {"version": version, "recipe": RECIPE, "flags": options.flags(), "shapes": profile_texts(profiles)}
    facts = {**bundle_facts(bundle), **build}
    if library == "tensorrt":
        if gpu is None:
            raise FarError(
                "no NVIDIA GPU can be used here, and TensorRT builds on the GPU that the engine is for; run far build "
                "there, or use ",
                SettingName("engine"),
                " tensorrt-rtx ",
                SettingName("target"),
                " sm89, say",
            )
        return EngineKey(library, {**facts, "device": gpu.name, "compute_capability": gpu.compute_capability})
    targets = options.targets or ((gpu.target,) if gpu else ())
    if not targets:
        raise FarError(
            "no NVIDIA GPU here to build for: give ",
            SettingName("target"),
            " with the compute capabilities of yours, as sm89 or sm86,sm89,sm120",
        )
    if gpu is None and (options.refittable or options.stripped):
        raise FarError(
            SettingName("refittable"),
            " and ",
            SettingName("weight_stripped"),
            ": TensorRT-RTX compiles such engines on a GPU only, and there is none here; leave them out",
        )
    return EngineKey(library, {**facts, "targets": sorted(set(targets), key=capability)})


def profile_texts(profiles: Mapping[str, Sequence[Shapes]]) -> dict[str, list[dict[str, str]]]:
    """Profiles as trtexec writes them: "1x256x16:4x256x16:64x256x16"."""
    return {
        graph: [
            {name: ":".join("x".join(map(str, shape)) for shape in shapes) for name, shapes in profile.items()}
            for profile in of_graph
        ]
        for graph, of_graph in profiles.items()
    }


def default_timing_cache(version: str, gpu: Gpu | None) -> Path:
    """TensorRT's timing cache in the user's cache folder, one for every version and GPU."""
    name = "".join(c if c.isalnum() else "-" for c in f"tensorrt-{version}-{gpu.name if gpu else 'none'}".lower())
    return user_cache() / "timing" / f"{name}.cache"


def build_graph(graph: Graph, job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Build the engine of one graph in a separate process; returns the notes on it for the sidecar.

    "seconds": of the build. "plan": bytes of the engine file.
    "activation", "weights", "scratch": bytes on the GPU, as far as the builder's log has them.
    "peak": most resident bytes of the process. "profiles": their number.
    "products": the number of matrix products and convolutions by precision.
    """
    if job["timing_cache"]:
        Path(job["timing_cache"]).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="far-build-") as aside:
        result, log = Path(aside) / "result.json", Path(aside) / "log.txt"
        code = _run({**job, "result": str(result)}, log)
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        done: dict[str, Any] = json.loads(result.read_text()) if result.exists() else {}
        if done.get("errno"):
            raise OSError(done["errno"], done["error"])
        if not Path(job["engine_file"]).exists() or "seconds" not in done:
            raise _failure(graph, job, code, done, lines)
        with (folder / LOG).open("a", encoding="utf-8") as file:
            file.write(f"== {graph.name}\n" + "\n".join(lines) + "\n")
    return {
        "seconds": round(done["seconds"], 3),
        "plan": Path(job["engine_file"]).stat().st_size,
        **memory_figures(lines),
        "peak": done.get("peak_bytes", 0),
        "products": done["products"],
        "profiles": len(job["profiles"]),
    }


def _run(job: Mapping[str, Any], log: Path) -> int:
    """Run the worker on a job, with its output in the file `log`; returns its exit code."""
    source = str(Path(far_runtime.__file__).resolve().parents[1])
    environment = {
        **os.environ,
        LIBRARY_VARIABLE: "1" if job["library"] == "tensorrt-rtx" else "0",
        "PYTHONPATH": os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "far_runtime.engines.tensorrt.builder.worker"],
            stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip
        assert process.stdin is not None
        # stdin stays open: the worker ends when it closes, which it does however this process ends.
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(job).encode() + b"\n")
                process.stdin.flush()
            return process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdin.close()


def _failure(
    graph: Graph, job: Mapping[str, Any], code: int, done: Mapping[str, Any], lines: Sequence[str]
) -> FarError:
    """The error for a build that left no engine; the whole log is kept in the user's cache folder."""
    kept = user_cache() / "logs" / f"build-{graph.name}.txt"
    where = ""
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text("\n".join(lines) + "\n", encoding="utf-8")
        where = f" (log: {kept})"
    if done.get("unknown_targets"):
        return FarError(f"graph {graph.name}: ", SettingName("target"), f" {done['unknown_targets']}{where}")
    if done.get("refused"):
        return FarError(f"graph {graph.name}: {done['refused']}{where}")
    if code < 0 and not done:
        reason = [
            "killed by the system, most likely for want of memory: give a smaller ", SettingName("batch"),
            " or more swap, or build on a machine with more memory",
        ] if code == -9 else [f"crashed (signal {-code})"]  # fmt: skip
        return FarError(f"graph {graph.name}: the build with {job['library']} was ", *reason, where)
    messages = errors(lines)
    detail = (messages[-1] if messages else done.get("error", f"exit code {code}")).rstrip(".")
    return FarError(f"graph {graph.name}: {job['library']} does not build it ({detail}){where}")


def build_line(name: str, notes: Mapping[str, Any]) -> str:
    """The line of text on a finished graph: seconds, sizes and memory."""
    parts = [f"{notes['seconds']:.1f} s", f"engine file {megabytes(notes['plan'])}"]
    parts += [f"{what} {megabytes(notes[what])}" for what in ("activation", "weights") if what in notes]
    products = ", ".join(f"{count} {precision}" for precision, count in sorted(notes["products"].items()))
    parts += [f"products: {products}"] if products else []
    parts += [f"{notes['profiles']} profiles"] if notes["profiles"] > 1 else []
    return f"{name}: {'; '.join(parts)}"


def megabytes(size: int) -> str:
    """Bytes as "12.3 MB"."""
    return f"{size / 1e6:.1f} MB"
