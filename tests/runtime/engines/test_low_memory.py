"""--low-memory: one graph at a time, and the same pictures."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from far_runtime.bundle import open_bundle
from far_runtime.engines.base import EngineOptions
from far_runtime.machine.memory import unmapping
from far_runtime.pipeline import Pipeline


@pytest.mark.parametrize(("engine", "held"), [("onnxruntime", "_sessions"), ("openvino", "_loaded")])
def test_one_graph_is_held_at_a_time_and_the_pictures_are_the_same(tiny: Any, engine: str, held: str) -> None:
    pytest.importorskip(engine, reason=f"{engine} is not installed")
    bundle = open_bundle(tiny.bundle)
    found = {}
    for low_memory in (False, True):
        with Pipeline.over(bundle, engine, EngineOptions(threads=1, low_memory=low_memory)) as pipeline:
            found[low_memory] = pipeline.generate([1, 2], [0, 1]).images
            graphs: Any = getattr(pipeline.engine, held)
            assert len(graphs) == 1 if low_memory else len(graphs) >= 3
    assert np.array_equal(found[True], found[False])


def test_pages_that_were_read_do_not_stay(tmp_path: Path) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("reads what Linux says of mapped memory")
    size = 8 << 20
    (tmp_path / "weights").write_bytes(bytes(size))

    def resident() -> int:
        return int(next(line for line in open("/proc/self/status") if line.startswith("RssFile")).split()[1]) * 1024

    with (tmp_path / "weights").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        before = resident()
        assert not any(mapped[::4096])
        assert resident() - before > size / 2
        with unmapping(tmp_path / "weights"):
            pass
        assert resident() - before < size / 2
        assert mapped[:] == bytes(size)
