"""One graph into one engine, in a process of its own, with a job as JSON on stdin:
`python -m far_runtime.engines.tensorrt.builder.worker`.

Its own process since Polygraphy decides by an environment variable, when it is imported, which of the two libraries it
drives; since a builder's memory is given back that way; and since a crash or a kill then ends one build and not `far`.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from far_runtime.machine.memory import peak_memory

MIB = 1 << 20


def main() -> None:
    """Build what stdin's first line asks for and write the result's JSON file; ends at once when stdin is closed, for
    then whoever asked is gone."""
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
    """Parse, configure, check the precisions, build, write job["engine_file"]; returns seconds and precisions."""
    from polygraphy.backend.trt import engine_bytes_from_network, network_from_onnx_path
    from polygraphy.logger import G_LOGGER

    from far_runtime.engines.tensorrt.builder.precision import compare, engine_products, missing, network_products

    G_LOGGER.module_severity = G_LOGGER.VERBOSE  # TensorRT's own INFO lines
    trt = load_library(job["library"])
    unknown = unknown_targets(trt, job)
    if unknown:
        return {"unknown_targets": unknown}
    started = time.monotonic()
    builder, network, parser = network_from_onnx_path(job["onnx"], strongly_typed=True)  # by path: weights beside it
    products = network_products(trt, network)
    wrong = missing(products, job["precision"])
    if wrong:
        return {"refused": wrong}
    timing = job.get("timing_cache")
    save = {"save_timing_cache": timing} if timing else {}
    engine = engine_bytes_from_network((builder, network, parser), config=make_config(trt, job), **save)
    result = {"seconds": time.monotonic() - started, "products": _counted(products)}
    if job["library"] == "tensorrt":
        # Needs a GPU, which a build with TensorRT proper has. TensorRT-RTX compiles its kernels when the engine is
        # loaded: what they compute in is not known before.
        wrong = compare(products, engine_products(trt, engine))
        if wrong:
            return {"refused": wrong}
        result["inspected"] = True
    with Path(job["engine_file"]).open("wb") as file:
        file.write(engine)
    return result


def unknown_targets(trt: Any, job: Mapping[str, Any]) -> str:
    """Which compute capabilities TensorRT-RTX does not build for; "" if none."""
    known = [name.lower() for name in getattr(trt, "ComputeCapability", trt).__dict__ if name.startswith("SM")]
    asked = [f"sm{major}{minor}" for major, minor in job["targets"]]
    if not set(asked) - set(known):
        return ""
    wrong = ", ".join(sorted(set(asked) - set(known)))
    return f"{wrong}: not known to tensorrt-rtx {trt.__version__}, which builds for {', '.join(sorted(known))}"


def load_library(library: str) -> Any:
    """The module of TensorRT or TensorRT-RTX."""
    if library == "tensorrt-rtx":
        import tensorrt_rtx

        return tensorrt_rtx
    import tensorrt

    return tensorrt


def make_config(trt: Any, job: Mapping[str, Any]) -> Callable[..., Any]:
    """Polygraphy's loader of the builder's configuration."""
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
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,  # what the inspector tells depends on it
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
        made: Callable[..., Any] = PostprocessConfig(
            config, lambda _, __, config: flag is None or config.set_flag(flag)
        )
        return made
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
    counts: dict[str, int] = {}
    for product in products:
        counts[product.precision] = counts.get(product.precision, 0) + 1
    return counts


if __name__ == "__main__":
    main()
