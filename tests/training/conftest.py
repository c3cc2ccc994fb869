"""A handful of pictures, a tiny VAE checkpoint and the latents cached with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

TINY = {
    "vae": ("--ch", 8, "--multipliers", "1,2", "--patch", 2, "--channels", 4, "--batch", 4, "--log-steps", 1),
    "far": (
        *("--width", 16, "--depth", 1, "--heads", 2, "--buffer", 2, "--head-width", 16, "--head-depth", 1),
        *("--draws", 1, "--batch", 4, "--sheet-steps", 2, "--log-steps", 1),
    ),
    "cache-latents": (),
}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like scripts/prepare_emoji.py's: 12 pictures of 16 pixels in 3 classes, 2 of them held out."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (12, 4, 4, 3), dtype=np.uint8)
    np.save(folder / "images.npy", coarse.repeat(4, axis=1).repeat(4, axis=2))
    np.save(folder / "labels.npy", np.arange(12) % 3)
    np.save(folder / "styles.npy", np.arange(12) % 2)
    (folder / "names.json").write_text(json.dumps(["ant", "bee", "cat"]))
    (folder / "split.json").write_text(json.dumps({"train": list(range(10)), "held_out": [10, 11]}))
    return folder


@pytest.fixture(scope="session")
def run_train() -> Callable[..., Result]:
    """Runs `far train COMMAND ARGS...` at tiny size in this process; FarError is left to the test."""
    from far_models.training.cli import train

    def run(command: str, *args: object, amp: str = "off") -> Result:
        precision = () if command == "cache-latents" else ("--amp", amp)
        line = [str(arg) for arg in (command, *TINY[command], *precision, *args)]
        return CliRunner().invoke(train, line, catch_exceptions=False)

    return run


@pytest.fixture(scope="session")
def vae_run(pictures: Path, run_train: Callable[..., Result], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a VAE trained for two steps."""
    folder = tmp_path_factory.mktemp("vae") / "run"
    result = run_train("vae", "--data", pictures, "-o", folder, "--steps", 2)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="session")
def latents(
    pictures: Path, vae_run: Path, run_train: Callable[..., Result], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Cached latents of the pictures."""
    folder = tmp_path_factory.mktemp("cache") / "latents"
    result = run_train("cache-latents", "--data", pictures, "--vae", vae_run / "vae.safetensors", "-o", folder)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="session")
def far_run(
    latents: Path, vae_run: Path, run_train: Callable[..., Result], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Six steps of FAR without a break, dropout and all."""
    folder = tmp_path_factory.mktemp("far") / "run"
    vae = vae_run / "vae.safetensors"
    result = run_train("far", "--data", latents, "--vae", vae, "-o", folder, "--steps", 6, "--dropout", 0.2)
    assert result.exit_code == 0, result.output
    return folder
