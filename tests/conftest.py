"""Shared by all tests: tiny checkpoints and the bundles made from them. torch is imported inside fixtures only, so that
tests of far_runtime can stay torch-free."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from argparse import Namespace
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import hypothesis
import pytest

# A busy machine is no failure.
hypothesis.settings.register_profile("far", deadline=None)
hypothesis.settings.load_profile("far")

# Several test processes share the machine: one thread each, set before any library starts its pool.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")

ROOT = Path(__file__).resolve().parents[1]
TINY_CLASSES = ("crane", "red fox", "fox terrier", "Crane", "dragonfly", "house cat", "tabby", "lion", "zebra", "owl")
MAKES_BUNDLES = (
    "far_export/**/*.py", "models/far_models/*.py", "far_runtime/samplers/*.py", "far_runtime/[bdefs]*.py",
    "constraints.txt", "tests/conftest.py",
)  # fmt: skip
A_DAY = 86400


@dataclass(frozen=True)
class Tiny:
    """A tiny FAR with random weights: both variants as .pth, the unmasked one as .safetensors with class names; a tiny
    MAR as .pth; a VAE; and three bundles. Files that a test changes are to be copied first.

    4 x 4 latents of 4 channels, 16 x 16 pixels, 10 classes. `bundle` is made from the safetensors file, with one
    transformer graph for all levels; `masked_bundle` from the masked .pth, with one graph for each of its levels, 0 and
    2; `mar_bundle` takes 4 iterations. All take 3 diffusion steps by default.
    """

    folder: Path

    @property
    def far(self) -> Path:
        return self.folder / "far.pth"

    @property
    def masked(self) -> Path:
        return self.folder / "far_mask.pth"

    @property
    def safetensors(self) -> Path:
        return self.folder / "far.safetensors"

    @property
    def mar(self) -> Path:
        return self.folder / "mar.pth"

    @property
    def vae(self) -> Path:
        return self.folder / "vae.ckpt"

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"

    @property
    def masked_bundle(self) -> Path:
        return self.folder / "bundle_mask"

    @property
    def mar_bundle(self) -> Path:
        return self.folder / "bundle_mar"


@pytest.fixture(scope="session")
def tiny(pytestconfig: pytest.Config) -> Tiny:
    """Made once per state of the sources, since tracing graphs takes a while, and kept in pytest's cache folder."""
    cache = pytestconfig.cache.mkdir("tiny")
    sources = sorted({path for pattern in MAKES_BUNDLES for path in ROOT.glob(pattern)})
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes that run side by side make it once
        made = Tiny(cache / key)
        if not made.folder.exists():
            aside = Tiny(cache / f"{key}.part")
            shutil.rmtree(aside.folder, ignore_errors=True)
            aside.folder.mkdir()
            make_checkpoints(aside)
            make_bundles(aside)
            for old in cache.iterdir():
                if old.is_dir() and time.time() - old.stat().st_mtime > A_DAY:
                    shutil.rmtree(old)
            aside.folder.rename(made.folder)
    return made


def make_checkpoints(tiny: Tiny) -> None:
    """Official layout: model, model_ema and an argparse.Namespace in the .pth; the VAE's state under "model"."""
    import torch
    from safetensors.torch import save_file

    from far_models.far import FAR, FARConfig
    from far_models.kl_vae import AutoencoderKL, VAEConfig
    from far_models.mar import MAR

    config = FARConfig(
        grid=4, channels=4, classes=10, buffer=3, encoder_width=32, encoder_depth=1, encoder_heads=2, decoder_width=32,
        decoder_depth=1, decoder_heads=2, head_width=32, head_depth=2, prediction="v",
    )  # fmt: skip
    torch.manual_seed(0)
    far, vae = FAR(config), AutoencoderKL(VAEConfig(ch=8, multipliers=(1, 1, 2), blocks=1, channels=4))
    mar = MAR(replace(config, masked=True))
    with torch.no_grad():  # tables that start as zeros would hide mistakes
        for parameter in (*far.parameters(), *mar.parameters()):
            if parameter.abs().sum() == 0:
                parameter.normal_(std=0.5)
    for path, model, said in (
        (tiny.far, far, {"mask": False}),
        (tiny.masked, far, {"mask": True}),
        (tiny.mar, mar, {}),
    ):
        args = Namespace(**said, encoder_heads=2, decoder_heads=2, prediction="v")
        other = {name: tensor + 0.01 for name, tensor in model.state_dict().items()}
        torch.save({"model": other, "model_ema": model.state_dict(), "epoch": 3, "args": args}, path)
    metadata = {"config": json.dumps(asdict(config)), "classes": json.dumps(TINY_CLASSES)}
    save_file(far.state_dict(), tiny.safetensors, metadata)
    torch.save({"model": vae.state_dict()}, tiny.vae)


def make_bundles(tiny: Tiny) -> None:
    """A bundle of both variants, and of MAR."""
    from far_export.export import export_bundle

    export_bundle(tiny.safetensors, tiny.vae, tiny.bundle, defaults={"steps": "3"})
    export_bundle(tiny.masked, tiny.vae, tiny.masked_bundle, defaults={"levels": [0, 2], "steps": "3"})
    export_bundle(tiny.mar, tiny.vae, tiny.mar_bundle, defaults={"iterations": 4, "steps": "3"})
