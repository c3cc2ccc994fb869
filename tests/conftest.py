"""Shared by all tests: tiny checkpoints and the bundles made from them. torch is imported inside fixtures only, so that
tests of far_runtime can stay torch-free."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import hypothesis
import pytest

# A busy machine is no failure.
hypothesis.settings.register_profile("far", deadline=None)
hypothesis.settings.load_profile("far")

# A shell that runs the tests in the background lets them ignore SIGINT, and what they start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Several test processes share the machine: one thread each, set before any library starts its pool.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")

ROOT = Path(__file__).resolve().parents[1]
TINY_CLASSES = ("crane", "red fox", "fox terrier", "Crane", "dragonfly", "house cat", "tabby", "lion", "zebra", "owl")
PACKAGES = ("far_runtime", "far_export", "models/far_models")
A_DAY = 86400


@dataclass(frozen=True)
class Tiny:
    """A folder of tiny models of every system with random weights, and of their bundles, which `far export` makes when
    a test asks for them; a test that changes a file copies it first.

    FAR comes masked and unmasked as .pth, and unmasked as .safetensors with class names. FAR, MAR and FAR-T2I have
    4 x 4 latents of 4 channels, 16 x 16 pixels, 10 classes, and bundles with 3 diffusion steps by default. VAR has
    scales of 1, 2, 3 and 4 tokens a side, 8 x 8 pixels, 5 classes.
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
    def t2i(self) -> Path:
        return self.folder / "far_t2i.pth"

    @property
    def bert(self) -> Path:
        return self.folder / "bert"

    @property
    def qwen2(self) -> Path:
        return self.folder / "qwen2"

    @property
    def vae(self) -> Path:
        return self.folder / "vae.ckpt"

    @property
    def var(self) -> Path:
        return self.folder / "var_d1.pth"

    @property
    def vqvae(self) -> Path:
        return self.folder / "vq_vae.pth"

    @property
    def bundle(self) -> Path:
        """From the .safetensors file, with one transformer graph for all levels."""
        return self._bundle("bundle", self.safetensors, "--default-steps", 3)

    @property
    def masked_bundle(self) -> Path:
        """With a transformer graph for each of its levels, 0 and 2."""
        levels = ("--levels", "per-level", "--default-levels", "0,2")
        return self._bundle("bundle_mask", self.masked, *levels, "--default-steps", 3)

    @property
    def mar_bundle(self) -> Path:
        """With 4 iterations by default."""
        return self._bundle("bundle_mar", self.mar, "--default", "iterations=4", "--default-steps", 3)

    @property
    def t2i_bundle(self) -> Path:
        """With 8 text tokens through the text encoder `bert`."""
        return self._bundle("bundle_t2i", self.t2i, "--text-encoder", self.bert, "--default-steps", 3)

    @property
    def var_bundle(self) -> Path:
        """With top-k 5 of 20 codes by default."""
        arguments = ("--config", "patch_nums=[1,2,3,4]", "--default", "top_k=5")
        return self._bundle("bundle_var", self.var, *arguments, vae=self.vqvae)

    def _bundle(self, name: str, checkpoint: Path, *arguments: object, vae: Path | None = None) -> Path:
        target = self.folder / name
        with locked(self.folder / f"{name}.lock"):
            if not target.exists():
                from click.testing import CliRunner

                from far_runtime.cli.main import cli

                command = ["export", checkpoint, "--vae", vae or self.vae, "-o", target, *arguments]
                result = CliRunner().invoke(cli, [str(part) for part in command], catch_exceptions=False)
                assert result.exit_code == 0, result.output
        return target


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Test processes that run side by side do what is in the block one after the other."""
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def tiny(pytestconfig: pytest.Config) -> Tiny:
    """Made once per state of the sources, since tracing graphs takes a while, and kept in pytest's cache folder."""
    cache = pytestconfig.cache.mkdir("tiny")
    sources = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    sources += [ROOT / "constraints.txt", ROOT / "tests" / "conftest.py"]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    with locked(cache / "lock"):
        made = Tiny(cache / key)
        if not made.folder.exists():
            aside = Tiny(cache / f"{key}.part")
            shutil.rmtree(aside.folder, ignore_errors=True)
            aside.folder.mkdir()
            make_checkpoints(aside)
            make_text_encoders(aside)
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
    from far_models.far_t2i import FART2I, FART2IConfig
    from far_models.kl_vae import AutoencoderKL, VAEConfig
    from far_models.mar import MAR

    config = FARConfig(
        grid=4, channels=4, classes=10, buffer=3, encoder_width=32, encoder_depth=1, encoder_heads=2, decoder_width=32,
        decoder_depth=1, decoder_heads=2, head_width=32, head_depth=2, prediction="v",
    )  # fmt: skip
    torch.manual_seed(0)
    far, vae = FAR(config), AutoencoderKL(VAEConfig(ch=8, multipliers=(1, 1, 2), blocks=1, channels=4))
    mar = MAR(replace(config, masked=True))
    t2i_config = FART2IConfig(
        grid=4, channels=4, context_tokens=8, context_width=12, encoder_width=32, encoder_depth=1, encoder_heads=1,
        decoder_width=32, decoder_depth=1, decoder_heads=1, head_width=32, head_depth=2,
    )  # fmt: skip
    t2i = FART2I(t2i_config)
    with torch.no_grad():  # tables that start as zeros would hide mistakes
        for parameter in (*far.parameters(), *mar.parameters(), *t2i.parameters()):
            if parameter.abs().sum() == 0:
                parameter.normal_(std=0.5)
    for path, model, said in (
        (tiny.far, far, {"mask": False}),
        (tiny.masked, far, {"mask": True}),
        (tiny.mar, mar, {}),
        (tiny.t2i, t2i, {}),
    ):
        args = Namespace(**said, encoder_heads=2, decoder_heads=2, prediction="v")
        other = {name: tensor + 0.01 for name, tensor in model.state_dict().items()}
        torch.save({"model": other, "model_ema": model.state_dict(), "epoch": 3, "args": args}, path)
    metadata = {"config": json.dumps(asdict(config)), "classes": json.dumps(TINY_CLASSES)}
    save_file(far.state_dict(), tiny.safetensors, metadata)
    torch.save({"model": vae.state_dict()}, tiny.vae)
    make_var_checkpoints(tiny)


def make_var_checkpoints(tiny: Tiny) -> None:
    """Flat state dicts, as the official files are."""
    import torch

    from far_models.var import VAR, VARConfig
    from far_models.vq_vae import VQVAE, VQVAEConfig

    scales = (1, 2, 3, 4)
    torch.manual_seed(0)
    var = VAR(VARConfig(patch_nums=scales, channels=32, vocabulary=20, classes=5, width=64, depth=1, heads=1))
    vqvae = VQVAE(VQVAEConfig(ch=32, multipliers=(1, 1), blocks=1, channels=32, vocabulary=20, patch_nums=scales))
    for path, model in ((tiny.var, var), (tiny.vqvae, vqvae)):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        torch.save(model.state_dict(), path)


WORDS = ("a", "red", "green", "apple", "lion", "user", "prompt", "and", "of", "the", "cat", "city", "street")


def make_text_encoders(tiny: Tiny) -> None:
    """Folders as Hugging Face's library saves them: a BERT under "bert." beside a pooler, and Qwen2-VL's language model
    in two files beside a picture encoder and a head."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    from far_models.text.bert import Bert, BertConfig
    from far_models.text.qwen2 import Qwen2, Qwen2Config

    def tokenizer(folder: Path, special: tuple[str, ...], template: str = "") -> None:
        folder.mkdir()
        vocabulary = {word: i for i, word in enumerate((*special, *WORDS))}
        made = Tokenizer(models.WordLevel(vocabulary, unk_token=special[-1]))
        made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
        if template:
            kept = [(word, vocabulary[word]) for word in special if word in template]
            made.post_processor = processors.TemplateProcessing(single=template, special_tokens=kept)
        made.enable_truncation(3)  # as some files have it, and the project must not heed
        made.enable_padding()
        made.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": special[0]}}))

    torch.manual_seed(1)
    sizes = {"vocab_size": 24, "hidden_size": 12, "num_hidden_layers": 2, "max_position_embeddings": 512}
    tokenizer(tiny.bert, ("[PAD]", "[CLS]", "[SEP]", "[UNK]"), "[CLS] $A [SEP]")
    more = {"model_type": "bert", "num_attention_heads": 3, "intermediate_size": 20, "hidden_act": "gelu"}
    (tiny.bert / "config.json").write_text(json.dumps({**sizes, **more}))
    bert = Bert(BertConfig(vocabulary=24, width=12, depth=2, heads=3, hidden=20, positions=512)).state_dict()
    pooler = {"bert.pooler.dense.weight": torch.zeros(12, 12)}
    save_file({f"bert.{name}": tensor for name, tensor in bert.items()} | pooler, tiny.bert / "model.safetensors")

    tokenizer(tiny.qwen2, ("<|endoftext|>", "<unk>"))
    more = {
        "model_type": "qwen2_vl", "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4,
        "intermediate_size": 20, "hidden_act": "silu", "rope_theta": 1e6, "rms_norm_eps": 1e-6,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0]}, "vision_config": {"depth": 1},
    }  # fmt: skip
    (tiny.qwen2 / "config.json").write_text(json.dumps({**sizes, **more}))
    network = Qwen2(Qwen2Config(24, width=12, depth=2, heads=6, groups=2, head_dim=4, hidden=20, positions=512))
    tensors = {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
    beside = {"lm_head.weight": torch.zeros(24, 12), "visual.merger.weight": torch.zeros(3, 3)}
    names = sorted({**tensors, **beside})
    files = {name: f"model-0000{1 + i * 2 // len(names)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: t for n, t in {**tensors, **beside}.items() if files[n] == file}, tiny.qwen2 / file)
    (tiny.qwen2 / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
