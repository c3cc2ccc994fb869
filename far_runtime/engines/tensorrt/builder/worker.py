"""The process that builds the engine of one graph: `python -m far_runtime.engines.tensorrt.builder.worker`.

It reads a job as JSON from stdin. It is a separate process for three reasons. Polygraphy chooses between TensorRT and
TensorRT-RTX by an environment variable when it is imported. The end of the process frees the builder's memory. And a
crash or a kill ends one build, not `far`.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from far_runtime.machine.memory import peak_memory

MIB = 1 << 20


def main() -> None:
    """Build the job in the first line of stdin and write the JSON file of its result.

    The process ends at once when stdin is closed: then the process that started it is gone.
    """
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    result: dict[str, Any] = {}
    try:
        result = build(job)
    except OSError as error:
        result = {"errno": error.errno, "error": str(error)}
    except Exception as error:  # Polygraphy and TensorRT raise their own
        result = {"error": f"{type(error).__name__}: {error}"}
    peak = peak_memory()
    if peak is not None:
        result["peak_bytes"] = peak
    Path(job["result"]).write_text(json.dumps(result))


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def build(job: Mapping[str, Any]) -> dict[str, Any]:
    """Parse the graph, check its precisions, build its engine and write job["engine_file"]; returns the result."""
    from polygraphy.backend.trt import engine_bytes_from_network, network_from_onnx_path
    from polygraphy.logger import G_LOGGER

    from far_runtime.engines.tensorrt.builder.precision import compare, engine_products, missing, network_products

    G_LOGGER.module_severity = G_LOGGER.VERBOSE  # TensorRT's own INFO lines
    trt = load_library(job["library"])
    unknown = unknown_targets(trt, job)
    if unknown:
        return {"unknown_targets": unknown}
    started = time.monotonic()
    # By its path, since the weights lie beside the graph.
    builder, network, parser = network_from_onnx_path(job["onnx"], strongly_typed=True)
    products = network_products(trt, network)
    wrong = missing(products, job["precision"])
    if wrong:
        return {"refused": wrong}
    timing = job.get("timing_cache")
    save = {"save_timing_cache": timing} if timing else {}
    engine = engine_bytes_from_network((builder, network, parser), config=make_config(trt, job), **save)
    result = {"seconds": time.monotonic() - started, "products": _counted(products)}
    if job["library"] == "tensorrt":
        # The inspector needs a GPU, as every build with TensorRT has. TensorRT-RTX compiles kernels when
        # it loads the engine, so their precision is not known before.
        wrong = compare(products, engine_products(trt, engine))
        if wrong:
            return {"refused": wrong}
        result["inspected"] = True
    with Path(job["engine_file"]).open("wb") as file:
        file.write(engine)
    return result


def unknown_targets(trt: Any, job: Mapping[str, Any]) -> str:
    """Which of the job's compute capabilities TensorRT-RTX does not build for; "" if none."""
    known = [name.lower() for name in getattr(trt, "ComputeCapability", trt).__dict__ if name.startswith("SM")]
    targets = [f"sm{major}{minor}" for major, minor in job["targets"]]
    if not set(targets) - set(known):
        return ""
    wrong = ", ".join(sorted(set(targets) - set(known)))
    return f"{wrong}: not known to tensorrt-rtx {trt.__version__}, which builds for {', '.join(sorted(known))}"


def load_library(library: str) -> Any:
    """The module of TensorRT or TensorRT-RTX."""
    if library == "tensorrt-rtx":
        import tensorrt_rtx

        return tensorrt_rtx
    import tensorrt

    return tensorrt


def make_config(trt: Any, job: Mapping[str, Any]) -> Callable[..., Any]:
    """Polygraphy's loader of the builder's configuration for a job."""
    from polygraphy.backend.trt import CreateConfig, Profile

    profiles = []
    for shapes in job["profiles"]:
        profile = Profile()
        for name, (low, usual, high) in shapes.items():
            profile.add(name, min=tuple(low), opt=tuple(usual), max=tuple(high))
        profiles.append(profile)
    flags = job["flags"]
    settings: dict[str, Any] = {
        "profiles": profiles,
        "refittable": flags.get("refittable", False),
        "strip_plan": flags.get("stripped", False),
        "weight_streaming": flags.get("weight_streaming", False),
        # The engine inspector shows layers in detail with this only.
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
    }
    if "workspace" in flags:
        settings["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: flags["workspace"] * MIB}
    if job["library"] == "tensorrt-rtx":
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
        from polygraphy.backend.trt import PostprocessConfig

        capabilities = [tuple(pair) for pair in job["targets"]]
        config = CreateConfigRTX(compute_capabilities=capabilities, **settings)
        # Without it an engine may allocate while it runs, and then it cannot be captured in a CUDA graph.
        flag = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
        postprocessed: Callable[..., Any] = PostprocessConfig(
            config, lambda _, __, config: flag is None or config.set_flag(flag)
        )
        return postprocessed
    if "hardware_compatible" in flags:
        level = {"ampere+": "AMPERE_PLUS", "same-cc": "SAME_COMPUTE_CAPABILITY"}[flags["hardware_compatible"]]
        settings["hardware_compatibility_level"] = getattr(trt.HardwareCompatibilityLevel, level)
    if "optimization_level" in flags:
        settings["builder_optimization_level"] = flags["optimization_level"]
    return CreateConfig(  # type: ignore[no-any-return]
        version_compatible=flags.get("version_compatible", False), load_timing_cache=job.get("timing_cache"), **settings
    )


def _counted(products: list[Any]) -> dict[str, int]:
    """How many matrix products and convolutions compute in which precision."""
    return Counter(product.precision for product in products)


if __name__ == "__main__":
    main()
