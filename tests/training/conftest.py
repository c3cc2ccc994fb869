"""A handful of pictures, tiny autoencoders, what is cached with them, and a short run of every trainer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from far_runtime.cli.option_names import with_options
from far_runtime.errors import FarError

AUTOENCODER = ("--ch", 8, "--multipliers", "1,2", "--patch", 2, "--channels", 4, "--batch", 4, "--log-steps", 1)
TRANSFORMER = ("--width", 16, "--depth", 1, "--heads", 2, "--batch", 4, "--log-steps", 1)
HEAD = ("--head-width", 16, "--head-depth", 1, "--draws", 1, "--sheet-steps", 2)
TINY: dict[str, tuple[object, ...]] = {
    "vae": AUTOENCODER,
    "vqvae": (*AUTOENCODER, "--vocabulary", 16, "--phis", 2, "--restart", 2),
    "far": (*TRANSFORMER, *HEAD, "--buffer", 2),
    "mar": (*TRANSFORMER, *HEAD, "--buffer", 2, "--sheet-iterations", 2),
    "far-t2i": (*TRANSFORMER, *HEAD),
    "var": TRANSFORMER,
    "cache-latents": (),
    "redraw-latents": (),
    "cache-text": (),
}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like scripts/zoo/prepare_emoji.py's: 12 pictures of 16 pixels in 3 classes, 2 of them held out."""
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
    """Runs `far train COMMAND ARGS...` at tiny size in this process; FarError is left to the test.

    Without `curves` they are not drawn, which takes longer than all the rest.
    """
    from far_training import sheets
    from far_training.cli.main import train

    def run(command: str, *args: object, amp: str = "off", curves: bool = False) -> Result:
        precision = () if command.endswith(("-latents", "-text")) else ("--amp", amp)
        line = [str(arg) for arg in (command, *TINY[command], *precision, *args)]
        with pytest.MonkeyPatch.context() as patch:
            if not curves:
                patch.setattr(sheets, "draw_curves", lambda records, path: None)
            return CliRunner().invoke(train, line, catch_exceptions=False)

    return run


@pytest.fixture(scope="session")
def refused(run_train: Callable[..., Result]) -> Callable[..., str]:
    """Runs `far train COMMAND ARGS...`, which has to fail; the error as the command line prints it."""

    def run(*args: object) -> str:
        with pytest.raises(FarError) as caught:
            run_train(*args)
        return with_options(caught.value)

    return run


@pytest.fixture(scope="session")
def vae_run(pictures: Path, run_train: Callable[..., Result], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a VAE trained for two steps."""
    folder = tmp_path_factory.mktemp("vae") / "run"
    result = run_train("vae", "--data", pictures, "-o", folder, "--steps", 2, curves=True)
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


@pytest.fixture(scope="session")
def vqvae_run(pictures: Path, run_train: Callable[..., Result], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a VQ-VAE trained for four steps."""
    folder = tmp_path_factory.mktemp("vqvae") / "run"
    result = run_train("vqvae", "--data", pictures, "-o", folder, "--steps", 4)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="session")
def tokens(
    pictures: Path, vqvae_run: Path, run_train: Callable[..., Result], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Cached tokens of the pictures."""
    folder = tmp_path_factory.mktemp("cache") / "tokens"
    result = run_train("cache-latents", "--data", pictures, "--vae", vqvae_run / "vqvae.safetensors", "-o", folder)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="session")
def text(pictures: Path, tiny: Any, run_train: Callable[..., Result], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cached features of the pictures' prompts."""
    folder = tmp_path_factory.mktemp("cache") / "text"
    result = run_train("cache-text", "--data", pictures, "--text-encoder", tiny.bert, "--tokens", 9, "-o", folder)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="session")
def inputs(pictures: Path, latents: Path, tokens: Path, text: Path, vae_run: Path, vqvae_run: Path) -> dict[str, Any]:
    """By kind of run, the command and the options that name its data."""
    on_latents = ("--data", latents, "--vae", vae_run / "vae.safetensors")
    return {
        "vqvae": ("vqvae", "--data", pictures),
        "mar": ("mar", *on_latents),
        "far_t2i": ("far-t2i", *on_latents, "--text", text),
        "var": ("var", "--data", tokens, "--vae", vqvae_run / "vqvae.safetensors"),
        "residual": ("var", *on_latents, "--tokens", "continuous", *HEAD),
        "plain": ("var", *on_latents, "--tokens", "continuous", "--no-residual", *HEAD),
    }


@pytest.fixture(scope="session")
def runs(
    inputs: dict[str, Any], vqvae_run: Path, run_train: Callable[..., Result], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """By kind, the folder of a run of four steps without a break."""
    folders = {"vqvae": vqvae_run}
    for trainer in inputs.keys() - folders.keys():
        folders[trainer] = tmp_path_factory.mktemp(trainer) / "run"
        result = run_train(*inputs[trainer], "-o", folders[trainer], "--steps", 4)
        assert result.exit_code == 0, result.output
    return folders


@pytest.fixture(scope="session")
def tiny_sizes() -> dict[str, list[str]]:
    """By command, the options of a tiny run, for one that is started by hand."""
    return {name: [str(option) for option in (*options, "--amp", "off")] for name, options in TINY.items()}
