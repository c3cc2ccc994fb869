"""An engine for the tests of far bench, opened by entry point: ONNX Runtime that fails as it is told to.

`fake:memory` has no memory for 3 pictures or more, `fake:killed` takes its process with it there, `fake:broken` raises
something of its own at 2 or more, `fake:shut` cannot be opened, `fake:log` notes its process in far-bench.pid.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from far_runtime.bench.engine_specs import CheckpointFiles
from far_runtime.bundle import Bundle
from far_runtime.engines.base import Array, EngineOptions
from far_runtime.engines.onnxruntime import OnnxRuntimeEngine


class FailingEngine(OnnxRuntimeEngine):
    def __init__(self, bundle: Bundle, way: str, options: EngineOptions) -> None:
        super().__init__(bundle, "cpu", options)
        self.name = f"fake:{way}"
        self.way = way

    def run(
        self, stage: str, inputs: Mapping[str, Array], constants: Mapping[str, int] | None = None
    ) -> dict[str, Array]:
        batch = next(iter(inputs.values())).shape()[0]
        if self.way == "memory" and batch >= 3:
            raise MemoryError
        if self.way == "killed" and batch >= 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.way == "broken" and batch >= 2:
            raise ArithmeticError("the wheel is off")
        return super().run(stage, inputs, constants)


def open_plugin(bundle: Bundle, variant: str, options: EngineOptions, sources: CheckpointFiles) -> FailingEngine:
    if variant == "shut":
        raise ValueError("the door is locked")
    if variant == "log":
        Path("far-bench.pid").write_text(str(os.getpid()))
    return FailingEngine(bundle, variant, options)


def matrix_product(device: str, precision: str, size: int, threads: int | None) -> Any:
    return None
