"""An engine over a few stages, without a complete bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from far_export.stages.stage import Stage
from far_export.torch_engine import TorchEngine
from far_runtime.bundle import Bundle, Manifest, record_of, write_manifest
from far_runtime.engines import open_engine
from far_runtime.engines.base import Engine
from far_runtime.model_info import ModelInfo

ENGINES = ("torch", "onnxruntime", "openvino")


def engine_of(stages: Sequence[Stage], name: str, folder: Path) -> Engine:
    """An engine over `stages`. torch runs their modules; the others run their graphs, exported into `folder`."""
    if name == "torch":
        return TorchEngine(stages)
    from far_export.onnx.writer import export_stages

    folder.mkdir(parents=True)
    graphs = export_stages(stages, folder)
    files = {path.name: record_of(path) for path in sorted(folder.iterdir())}
    manifest = Manifest("stages", ModelInfo(grid=1, channels=1, image_size=1), {}, graphs, files)
    write_manifest(folder, manifest)
    return open_engine(Bundle(folder, manifest), name)
