"""TensorRT engines on the simulator, and pipelines over them beside ONNX Runtime's."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from far_runtime.bundle import open_bundle
from far_runtime.engines.base import EngineOptions
from far_runtime.engines.tensorrt import engine as tensorrt
from far_runtime.engines.tensorrt.engine import TensorRtEngine
from far_runtime.pipeline import Pipeline
from simulated_cuda import SimulatedCuda
from simulated_tensorrt import VERSION, Device, plan_of, simulated_tensorrt


class Simulation:
    """A simulated GPU with its library, and engines opened on it."""

    def __init__(self, library: str = "tensorrt-rtx", version: str = VERSION, **cuda: Any) -> None:
        self.library = library
        self.cuda = SimulatedCuda(**cuda)
        self.device = Device(self.cuda, library == "tensorrt-rtx", version)
        self.module = simulated_tensorrt(self.device)

    def engine(
        self,
        path: Path,
        options: EngineOptions | None = None,
        profiles: Mapping[str, Sequence[Mapping[str, tuple[int, int, int]]]] | None = None,
        **plan: Any,
    ) -> TensorRtEngine:
        """An engine over a bundle whose graphs were "built" with these profiles (by graph) and `plan_of`'s other
        settings."""
        bundle = open_bundle(path, check=False)
        graphs = {graph.name: graph for graph in bundle.manifest.graphs}
        return TensorRtEngine(
            bundle,
            self.library,
            lambda name: plan_of(bundle, graphs[name], (profiles or {}).get(name, ()), **plan),
            options,
        )

    def pipeline(self, path: Path, options: EngineOptions | None = None, **plan: Any) -> Pipeline:
        return Pipeline(open_bundle(path, check=False), self.engine(path, options, **plan))


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes simulations; the engine finds the last one made in place of the libraries."""

    def make(*arguments: Any, **more: Any) -> Simulation:
        made = Simulation(*arguments, **more)
        monkeypatch.setattr(tensorrt, "load_libraries", lambda library: (made.module, made.cuda))
        return made

    return make


@pytest.fixture
def simulation(simulate: Any) -> Simulation:
    made: Simulation = simulate()
    return made


SYSTEMS = ("far", "far_mask", "mar", "far_t2i", "var")


@pytest.fixture(params=SYSTEMS)
def system_bundle(request: pytest.FixtureRequest, tiny: Any) -> Path:
    """The tiny bundle of each system."""
    bundles = {"far": "bundle", "far_mask": "masked_bundle", "mar": "mar_bundle", "far_t2i": "t2i_bundle",
               "var": "var_bundle"}  # fmt: skip
    return Path(getattr(tiny, bundles[request.param]))


@pytest.fixture
def bundle_copy(tiny: Any, tmp_path: Path) -> Iterator[Path]:
    yield Path(shutil.copytree(tiny.bundle, tmp_path / "bundle"))


@pytest.fixture
def pipelines(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Makes pipelines over a bundle, ONNX Runtime's and the simulated one; closes them, and then nothing is left."""
    made: list[tuple[Simulation, Pipeline]] = []

    def open_both(
        path: Path, options: EngineOptions | None = None, simulation: Simulation | None = None, **plan: Any
    ) -> tuple[Pipeline, Pipeline]:
        simulated = simulation or request.getfixturevalue("simulation")
        pipeline = simulated.pipeline(path, options, **plan)
        made.append((simulated, pipeline))
        return Pipeline.from_bundle(path, "onnxruntime", threads=1, check=False), pipeline

    yield open_both
    for simulated, pipeline in made:
        pipeline.close()
        assert simulated.cuda.live == {"device": 0, "pinned": 0}
