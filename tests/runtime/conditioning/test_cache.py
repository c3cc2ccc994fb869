"""What depends on a subject alone is computed once, alone, and never more of it is kept than was allowed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from far_runtime.conditioning.cache import LruArrays
from far_runtime.engines.base import Engine
from far_runtime.errors import FarError
from far_runtime.pipeline import Pipeline


@given(st.lists(st.integers(0, 8), max_size=40), st.integers(0, 5))
def test_the_last_arrays_that_fit_are_kept(keys: list[int], fitting: int) -> None:
    arrays, computed, size = LruArrays(fitting * 40), [], 40

    def make(key: int) -> np.ndarray:
        computed.append(key)
        return np.full(size // 4, key, np.float32)

    for i, key in enumerate(keys):
        recent = list(dict.fromkeys(reversed(keys[:i])))[:fitting]
        before = len(computed)
        assert (arrays.get(key, lambda key=key: make(key)) == key).all()
        assert (len(computed) == before) == (key in recent)
        assert arrays.size == 40 * len(arrays) <= arrays.limit


def test_an_array_cannot_be_written_to() -> None:
    arrays, array = LruArrays(100), np.zeros(3, np.float32)
    kept = arrays.get(1, lambda: array)
    array[:] = 1
    assert (kept == 0).all()
    with pytest.raises(ValueError, match="read-only"):
        kept[0] = 1


def test_what_is_not_finite_is_computed_again() -> None:
    arrays = LruArrays(1024)
    for value in (np.inf, np.nan):
        assert not np.isfinite(arrays.get("a", lambda value=value: np.full(3, value, np.float32))).any()
    assert arrays.get("a", lambda: np.ones(3, np.float32)).sum() == 3
    assert arrays.get("a", lambda: np.zeros(3, np.float32)).sum() == 3


class RowsDiffer:
    """An engine whose transformer depends on the size of the batch and on the row, far more than rounding does."""

    def __init__(self, engine: Engine, smallest: int = 1) -> None:
        self.engine, self.name, self.smallest_batch = engine, "uneven", smallest
        self.put, self.get, self.close = engine.put, engine.get, engine.close
        self.runs = 0

    def run(self, stage: str, inputs: Any, constants: Any = None) -> dict[str, Any]:
        outputs = self.engine.run(stage, inputs, constants)
        if stage == "transformer":
            self.runs += 1
            condition = self.get(outputs["condition"])
            if len(condition) < self.smallest_batch:
                raise FarError("its engine takes 2 to 8")
            rows = np.arange(len(condition), dtype=np.float32)[:, None, None]
            outputs["condition"] = self.put(condition + np.float32(0.01) * (len(condition) + rows))
        return outputs


ONE_STEP = {"far": {"levels": [0]}, "mar": {"iterations": 1}}


def test_neighbours_and_history_do_not_matter(any_pipeline: Pipeline) -> None:
    bundle = any_pipeline.bundle
    settings = {"steps": 2, "guidance": 1.0, **ONE_STEP[bundle.manifest.system]}
    uneven = Pipeline(bundle, RowsDiffer(any_pipeline.engine))
    batch = uneven.generate([3, 1, 4], [9, 2, 6], **settings).latents
    alone = Pipeline(bundle, RowsDiffer(any_pipeline.engine)).generate([1], [2], **settings).latents
    assert np.allclose(batch[1], alone[0], atol=1e-6)
    plain = Pipeline(bundle, RowsDiffer(any_pipeline.engine), cache_bytes=0).generate([3, 1, 4], [9, 2, 6], **settings)
    assert not np.allclose(batch, plain.latents, atol=1e-2)


def test_settings_of_the_first_level_are_told_apart(pipeline: Pipeline) -> None:
    fresh = Pipeline(pipeline.bundle, pipeline.engine).generate([1], [0], levels=[1, 2], guidance=1.0)
    pipeline.generate([1], [0], levels=[0, 2])
    assert np.array_equal(pipeline.generate([1], [0], levels=[1, 2], guidance=1.0).latents, fresh.latents)


def test_a_bound_that_nothing_fits_only_costs_time(any_pipeline: Pipeline) -> None:
    counting = RowsDiffer(any_pipeline.engine)
    narrow = Pipeline(any_pipeline.bundle, counting, cache_bytes=1)
    first, again = (narrow.generate([3, 1], [0, 1]) for _ in range(2))
    assert np.array_equal(first.latents, again.latents)
    roomy = Pipeline(any_pipeline.bundle, RowsDiffer(any_pipeline.engine))
    assert np.array_equal(first.latents, roomy.generate([3, 1], [0, 1]).latents)


def test_an_engine_that_takes_no_single_picture_draws_all_the_same(any_pipeline: Pipeline) -> None:
    large = RowsDiffer(any_pipeline.engine, smallest=2)
    drawn = Pipeline(any_pipeline.bundle, large).generate([3, 1], [0, 1])
    plain = Pipeline(any_pipeline.bundle, RowsDiffer(any_pipeline.engine), cache_bytes=0).generate([3, 1], [0, 1])
    assert np.array_equal(drawn.latents, plain.latents)


def test_an_engine_that_fails_is_not_taken_for_one_of_larger_batches(pipeline: Pipeline) -> None:
    failing = RowsDiffer(pipeline.engine, smallest=2)
    failing.smallest_batch = 1
    opened = Pipeline(pipeline.bundle, failing)
    failing.smallest_batch = 9  # now it fails, whatever it said
    with pytest.raises(FarError, match="its engine takes 2 to 8"):
        opened.generate([3, 1], [0, 1])
    failing.smallest_batch = 1
    runs = failing.runs
    opened.generate([3, 1], [0, 1])
    again = failing.runs
    opened.generate([3, 1], [0, 1])
    assert again - runs > failing.runs - again, "the cache is in use"
