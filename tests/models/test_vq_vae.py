"""The VQ-VAE: resizes as torch's, residual coding as the paper's algorithm, and its checkpoints."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from far_models.checkpoint.load import load_checkpoint
from far_models.vq_vae import VQVAE, VQVAEConfig
from far_runtime.errors import FarError
from far_runtime.sampling.pyramid import SCALES_256, SCALES_512, phi_index, resize_tables, token_ranges

CASES = Path(__file__).parents[1] / "golden"
TINY = VQVAEConfig(ch=8, multipliers=(1, 2), blocks=1, channels=6, vocabulary=20, patch_nums=(1, 2, 3, 4))


def tiny() -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(TINY).eval()


@pytest.mark.parametrize("scales", [SCALES_256, SCALES_512, (1, 3, 7)])
def test_tables_resize_as_torch_does(scales: tuple[int, ...]) -> None:
    up, down = (torch.from_numpy(table.copy()) for table in resize_tables(scales))
    last = scales[-1]
    cells = torch.randn(1, 1, last, last)
    for side, (start, end) in zip(scales, token_ranges(scales), strict=True):
        small = torch.randn(1, 1, side, side)
        added = functional.interpolate(small, size=(last, last), mode="bicubic") if side < last else small
        torch.testing.assert_close(up[start:end].T @ small.flatten(), added.flatten(), rtol=0, atol=1e-5)
        shrunk = functional.interpolate(cells, size=(side, side), mode="area")
        torch.testing.assert_close(down[start:end] @ cells.flatten(), shrunk.flatten(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("scales", "phis", "expected"),
    [
        (10, 4, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),
        (10, 1, [0] * 10),
        (10, 10, list(range(10))),
        (5, 2, [0, 0, 0, 1, 1]),
        (4, 4, [0, 1, 2, 3]),
        (1, 4, [0]),
    ],
)
def test_which_convolution_refines_a_scale(scales: int, phis: int, expected: list[int]) -> None:
    assert [phi_index(i, scales, phis) for i in range(scales)] == expected


def by_the_book(vqvae: VQVAE, features: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Tokens and feature maps of every scale by algorithm 1, with torch's resizes and distances."""
    codes, last = vqvae.quantize.embedding.weight, TINY.patch_nums[-1]
    rest, total = features.clone(), torch.zeros_like(features)
    tokens, states = [], []
    for i, side in enumerate(TINY.patch_nums):
        small = functional.interpolate(rest, size=(side, side), mode="area").permute(0, 2, 3, 1)
        nearest = torch.cdist(small.reshape(-1, TINY.channels), codes).argmin(1).reshape(-1, side, side)
        added = codes[nearest].permute(0, 3, 1, 2)
        if side < last:
            added = functional.interpolate(added, size=(last, last), mode="bicubic")
        phi = vqvae.quantize.quant_resi.qresi_ls[phi_index(i, len(TINY.patch_nums), TINY.phis)]
        change = 0.5 * added + 0.5 * functional.conv2d(added, phi.weight, phi.bias, padding=1)
        total, rest = total + change, rest - change
        tokens.append(nearest.flatten(1))
        states.append(total)
    return tokens, states


def test_coding_follows_the_paper() -> None:
    vqvae = tiny()
    quantizer = vqvae.quantize
    with torch.no_grad():
        features = vqvae.encode(torch.randn(3, 3, 8, 8))
        tokens, states = by_the_book(vqvae, features)
        encoded = quantizer.encode(features.flatten(2).transpose(1, 2))
        assert torch.equal(encoded, torch.cat(tokens, dim=1))
        for actual, state in zip(quantizer.states(encoded), states, strict=True):
            torch.testing.assert_close(actual, state.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)
        sides = TINY.patch_nums[1:]
        shrunk = [functional.interpolate(s, size=(n, n), mode="area") for s, n in zip(states, sides, strict=False)]
        inputs = torch.cat([one.flatten(2).transpose(1, 2) for one in shrunk], dim=1)
        torch.testing.assert_close(quantizer.inputs(encoded), inputs, rtol=1e-4, atol=1e-5)


def test_training_output_loss_and_gradients() -> None:
    vqvae = tiny().train()
    features = torch.randn(2, 6, 4, 4, requires_grad=True)
    quantized, loss, tokens = vqvae.quantize(features)
    expected, states = by_the_book(vqvae, features.detach())
    assert torch.equal(tokens, torch.cat(expected, dim=1))
    torch.testing.assert_close(quantized, states[-1], rtol=1e-4, atol=1e-5)
    expected = torch.stack([1.25 * functional.mse_loss(state, features) for state in states]).mean()
    torch.testing.assert_close(loss, expected)
    weight = torch.randn_like(quantized)
    (gradient,) = torch.autograd.grad((quantized * weight).sum(), features, retain_graph=True)
    assert torch.equal(gradient, weight)
    loss.backward()
    assert vqvae.quantize.embedding.weight.grad.abs().sum() > 0
    assert all(phi.weight.grad is not None for phi in vqvae.quantize.quant_resi.qresi_ls)


def test_other_scales_share_the_weights() -> None:
    vqvae = tiny()
    other = vqvae.with_scales((1, 4))
    assert other.config == replace(TINY, patch_nums=(1, 4))
    assert other.quantize.embedding.weight.data_ptr() == vqvae.quantize.embedding.weight.data_ptr()
    assert other.quantize.encode(torch.randn(1, 16, 6)).shape == (1, 17)
    assert vqvae.with_scales(TINY.patch_nums) is vqvae


def test_parameters_bear_the_official_names() -> None:
    case = json.loads((CASES / "var" / "case.json").read_text())
    with torch.device("meta"):
        state = VQVAE(VQVAEConfig(ch=case["vae_ch"])).state_dict()
    official = {name[4:]: shape for name, shape in case["parameters"].items() if name.startswith("vae.")}
    assert {name: list(tensor.shape) for name, tensor in state.items()} == official


def test_a_flat_state_dict_with_a_buffer_loads(tmp_path: Path) -> None:
    vqvae = tiny()
    torch.save(vqvae.state_dict() | {"quantize.ema_vocab_hit_SV": torch.zeros(4, 20)}, tmp_path / "vae.pth")
    loaded = load_checkpoint(tmp_path / "vae.pth", expect="vqvae").model
    assert replace(loaded.config, patch_nums=TINY.patch_nums) == TINY
    with torch.no_grad():
        images = torch.randn(1, 3, 8, 8)
        features = vqvae.encode(images)
        assert torch.equal(loaded.encode(images), features)
        assert torch.equal(loaded.decode(features), vqvae.decode(features))


def test_our_trainer_s_file_states_its_scales(tmp_path: Path) -> None:
    metadata = {"system": "vqvae", "config": json.dumps(asdict(TINY))}
    save_file(tiny().state_dict(), tmp_path / "vae.safetensors", metadata)
    assert load_checkpoint(tmp_path / "vae.safetensors").model.config == TINY


def test_pixels_may_be_folded(tmp_path: Path) -> None:
    config = replace(TINY, patch=2)
    torch.save(VQVAE(config).state_dict(), tmp_path / "vae.pth")
    loaded = load_checkpoint(tmp_path / "vae.pth", overrides={"patch_nums": [1, 2, 3, 4]}).model
    assert loaded.config == config
    assert loaded.encode(torch.randn(1, 3, 16, 16)).shape == (1, 6, 4, 4)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    state = tiny().state_dict()
    torch.save({name: t for name, t in state.items() if "quant_resi" not in name}, tmp_path / "vae.pth")
    with pytest.raises(FarError, match=r"no quantize\.quant_resi\.qresi_ls"):
        load_checkpoint(tmp_path / "vae.pth")
    state["encoder.conv_in.weight"] = torch.from_numpy(np.zeros((8, 5, 3, 3), np.float32))
    torch.save(state, tmp_path / "vae.pth")
    with pytest.raises(FarError, match="takes 5 channels; expected 3 x patch"):
        load_checkpoint(tmp_path / "vae.pth")
    with pytest.raises(FarError, match="do not rise"):
        torch.save(tiny().state_dict(), tmp_path / "vae.pth")
        load_checkpoint(tmp_path / "vae.pth", overrides={"patch_nums": [1, 3, 2]})
