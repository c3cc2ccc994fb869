"""Large data: shards that several processes write and that a killed run goes on with, folders of pictures, batches
that are fetched ahead."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from numpy.typing import NDArray
from PIL import Image

from far_models.pictures import open_pictures, shuffled, visiting_order
from far_runtime.errors import FarError
from far_training.data import latents as caches
from far_training.data.latents import open_cache
from far_training.data.shards import ShardedArray, Shards, begin_folder, finish_folder, write_shards
from far_training.loop.prefetch import Prefetcher
from far_training.loop.processes import ALONE

Run = Callable[..., Result]
VALUES = np.arange(23 * 2, dtype=np.float32).reshape(23, 2)


def silent(line: str) -> None:
    """Says nothing."""


def same(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """What is written is what is read."""
    return rows


def array(read: Callable[[NDArray[np.int64]], NDArray[np.float32]], batch: int = 4) -> ShardedArray:
    """VALUES in shards of four rows, as `read` gives them."""
    return ShardedArray(count=23, rows=4, read=read, encode=same, batch=batch)


def rows_of(rows: NDArray[np.int64]) -> NDArray[np.float32]:
    return VALUES[rows]


def test_shards_hold_every_row_once(tmp_path: Path) -> None:
    for rank in (1, 0):
        write_shards(tmp_path, array(rows_of, batch=3), silent, replace(ALONE, rank=rank, world=2))
    assert len(list(tmp_path.iterdir())) == 6
    shards = Shards(tmp_path, 23, 4)
    chosen = np.array([22, 0, 7, 7, 13])
    np.testing.assert_array_equal(shards[chosen], VALUES[chosen])
    assert np.concatenate([rows for rows, _ in shards.blocks()]).tolist() == list(range(23))
    assert isinstance(next(block for _, block in shards.blocks()), np.memmap)
    (tmp_path / "shard-00003.npy").unlink()
    with pytest.raises(FarError, match=r"shard-00003\.npy: no such file"):
        Shards(tmp_path, 23, 4)
    np.save(tmp_path / "shard-00003.npy", VALUES[:3])
    with pytest.raises(FarError, match="expected 4 rows"):
        Shards(tmp_path, 23, 4)[np.array([13])]


def test_what_was_begun_goes_on(tmp_path: Path) -> None:
    out, asked = tmp_path / "cache", []
    staging = begin_folder(out, {"vae": "a"})

    def dying(rows: NDArray[np.int64]) -> NDArray[np.float32]:
        if rows[0] >= 8:
            raise KeyboardInterrupt
        return VALUES[rows]

    with pytest.raises(KeyboardInterrupt):
        write_shards(staging, array(dying), silent)
    assert not out.exists()
    with pytest.raises(FarError, match="remove it"):
        begin_folder(out, {"vae": "b"})
    assert begin_folder(out, {"vae": "a"}) == staging

    def asking(rows: NDArray[np.int64]) -> NDArray[np.float32]:
        asked.append(int(rows[0]))
        return VALUES[rows]

    (staging / ".shard-00002.npy.1234.part").write_bytes(b"half")
    write_shards(staging, array(asking), silent)
    assert asked == [8, 12, 16, 20]
    finish_folder(staging, out)
    np.testing.assert_array_equal(Shards(out, 23, 4)[np.arange(23)], VALUES)
    assert sorted(path.name for path in out.iterdir()) == [f"shard-{number:05d}.npy" for number in range(6)]
    with pytest.raises(FarError, match="is there already"):
        begin_folder(out, {"vae": "a"})


def test_a_cache_in_shards_is_the_cache(
    latents: Path, pictures: Path, vae_run: Path, run_train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae, rows = vae_run / "vae.safetensors", np.array([11, 0, 5])
    flip = np.array([True, False, True])
    whole = open_cache(latents, vae)
    monkeypatch.setattr(caches, "ROWS", 5)
    assert run_train("cache-latents", "--data", pictures, "--vae", vae, "-o", tmp_path / "small").exit_code == 0
    small = open_cache(tmp_path / "small", vae)
    assert len(list((tmp_path / "small").glob("shard-*.npy"))) == 3
    assert small.scale == pytest.approx(whole.scale)
    for a, b in zip(small.moments(rows, flip), whole.moments(rows, flip), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    run_train("cache-latents", "--data", pictures, "--vae", vae, "-o", tmp_path / "half", "--half")
    half = open_cache(tmp_path / "half", vae)
    for a, b in zip(half.moments(rows, flip), whole.moments(rows, flip), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4)


def test_folders_of_pictures_are_read_in_order(tmp_path: Path) -> None:
    for label, name in enumerate(("ant", "bee")):
        for place in ("", "more/"):
            (tmp_path / name / place).mkdir(parents=True, exist_ok=True)
            for i in range(3):
                colour = (100 * label + 10 * i + len(place), 0, 0)
                Image.new("RGB", (6, 4), colour).save(tmp_path / name / f"{place}{i}.png")
    (tmp_path / "ant" / "notes.txt").write_text("no picture")
    pictures = open_pictures(tmp_path, 4)
    assert pictures.names == ("ant", "bee")
    assert pictures.labels.tolist() == [0] * 6 + [1] * 6
    reds = pictures.read(np.arange(12))[:, 0, 0, 0].tolist()
    assert reds == [0, 10, 20, 5, 15, 25, 100, 110, 120, 105, 115, 125]


def test_the_order_of_a_pass_is_kept_and_whole() -> None:
    visited = np.concatenate([visiting_order(step, 4, 10, 3) for step in range(5)])
    assert sorted(visited[:10]) == sorted(visited[10:]) == list(range(10))
    assert visited[:10].tolist() == shuffled(10, 3, 0).tolist() != visited[10:].tolist()


def test_batches_are_fetched_ahead_and_in_order() -> None:
    fetched: list[tuple[int, str]] = []

    def fetch(number: int) -> tuple[int, ...]:
        fetched.append((number, threading.current_thread().name))
        return (number,)

    with Prefetcher(fetch) as prefetcher:  # type: ignore[arg-type]
        assert prefetcher.get((0,), (1,)) == (0,)
        assert prefetcher.get((1,), (2,)) == (1,)
        assert prefetcher.get((7,), (8,)) == (7,)
    assert [number for number, _ in sorted(fetched)][:2] == [0, 1]
    assert dict(fetched)[0] == dict(fetched)[7] == threading.current_thread().name
    assert dict(fetched)[1].startswith("prefetch")
