"""The released code's sampling loops in torch, as wasteful as they are: what the ledger holds ours against.

FAR and MAR (sample_tokens in models/far.py and models/mar.py, sample in models/diffloss.py): both halves of guidance at
every step, also where the scale is 1; the conditions, the level's and the timestep's embeddings of every row at every
diffusion step; 100 steps a level. VAR (autoregressive_infer_cfg in models/var.py): the modulations of every block anew
at every scale, keys and values put together by concatenation. The networks are far_models', which compute what the
official ones do (tests/golden).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from far_models.far import FAR
from far_models.var import VAR, KeyValueCache
from far_models.vq_vae import VQVAE
from far_runtime.errors import FarError
from far_runtime.sampling.base import Step
from far_runtime.sampling.far import visible_tokens
from far_runtime.sampling.lowpass import lowpass_matrices
from far_runtime.sampling.noise import NoiseSource
from far_runtime.sampling.noise_schedule import posterior, respaced_timesteps, x0_from_output
from far_runtime.sampling.pyramid import phi_index, progress, token_ranges
from far_runtime.sampling.reverse_diffusion import restore_index

OFFICIAL_STEPS = 100


def autocast(amp: bool) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast on the CPU, or nothing."""
    return torch.autocast("cpu", torch.bfloat16) if amp else contextlib.nullcontext()


class ReleasedHead:
    """The diffusion head's DDPM of `steps` steps: one call is one step over 2 N rows."""

    def __init__(self, model: FAR, steps: int = OFFICIAL_STEPS, amp: bool = False) -> None:
        self.net, self.amp = model.diffloss.net, amp
        constants = posterior(respaced_timesteps(steps))
        a, b = x0_from_output(constants.alphas_cumprod, model.config.prediction)
        self.timesteps = constants.timesteps
        self.constants = torch.from_numpy(
            np.stack([a, b, constants.mean_x0, constants.mean_xt, constants.log_betas, constants.log_variance])
        )

    def step(
        self, x: Tensor, z: Tensor, i: int, level: float | None, guidance: float, temperature: float, noise: Tensor
    ) -> Tensor:
        """x [2 N, C] at the kept timestep i (rising), z [2 N, w] -> x at the one before. The halves are alike."""
        half = x[: len(x) // 2]
        rows = torch.cat([half, half])
        times = torch.full((len(rows),), float(self.timesteps[i]))
        levels = None if level is None else torch.full((len(rows), 1), level)
        with autocast(self.amp):
            out = self.net(rows, times, self.net.condition(z, levels))
        out = out.float()
        output, values = out.chunk(2, dim=1)
        conditional, unconditional = output.chunk(2)
        guided = unconditional + guidance * (conditional - unconditional)
        output, values = torch.cat([guided, guided]), torch.cat([values[: len(half)], values[: len(half)]])
        a, b, mean_x0, mean_xt, log_beta, log_posterior = (value.item() for value in self.constants[:, i])
        fraction = (values + 1) / 2
        # In float64 where terms cancel, as the runtime's table of coefficients is.
        mean = (mean_x0 * (a * rows.double() + b * output.double()) + mean_xt * rows.double()).float()
        if i == 0:
            return mean
        return mean + torch.exp(0.5 * (fraction * log_beta + (1 - fraction) * log_posterior)) * noise * temperature

    def sample(
        self, z: Tensor, level: float | None, step: Step, noise: NoiseSource, batch: int, tokens: int, channels: int
    ) -> Tensor:
        """The sample [batch, tokens, channels] under z [2 batch tokens, w]."""

        def both(array: Any) -> Tensor:
            rows = torch.from_numpy(array).reshape(-1, channels)
            return torch.cat([rows, rows])

        if step.shared:
            raise FarError("--shared-noise: the released loop has no such setting; use 0")
        count = len(self.timesteps)
        x, temperature = both(noise.start(step.index, tokens, channels)), float(step.temperature)
        for k, i in enumerate(reversed(range(count))):
            drawn = both(noise.diffusion(step.index, k, tokens, channels)) if i else x
            x = self.step(x, z, i, level, step.guidance, temperature, drawn)
        return x[: len(x) // 2].reshape(batch, tokens, channels)


class ReleasedFAR:
    """FAR's and MAR's loop. amp: the networks under bf16 autocast; compiled: through torch.compile."""

    def __init__(self, model: FAR, steps: int = OFFICIAL_STEPS, amp: bool = False, compiled: bool = False) -> None:
        self.model, self.amp = model, amp
        self.head = ReleasedHead(model, steps, amp)
        self.features = torch.compile(model.features) if compiled else model.features
        if compiled:
            self.head.net = torch.compile(self.head.net)

    def transformer(self, latents: Tensor, labels: Tensor, *indices: Tensor) -> Tensor:
        """z [2 B, L, w] of latents [B, L, C] and labels [2 B], both halves; indices [B, ...]: visible and restore."""
        with autocast(self.amp):
            z: Tensor = self.features(
                torch.cat([latents, latents]), self.model.class_embedding(labels), *(torch.cat([i, i]) for i in indices)
            )
        return z.float()

    def sample(self, plan: Sequence[Step], labels: Sequence[int], noise: NoiseSource) -> Tensor:
        """Latents [B, L, C] over an unmasked FAR's plan or MAR's."""
        config, batch = self.model.config, len(labels)
        both = torch.tensor([*labels, *[config.classes] * batch])
        latents = torch.zeros(batch, config.tokens, config.channels)
        if "level" in plan[0].constants:
            matrices = torch.from_numpy(lowpass_matrices(config.grid).copy())
            for step in plan:
                grid = latents.reshape(batch, config.grid, config.grid, -1)
                matrix = matrices[step.constants["lowpass"]]
                seen = torch.einsum("ij,bjkc,lk->bilc", matrix, grid, matrix).reshape(latents.shape)
                z = self.transformer(seen, both)
                z = z.reshape(-1, z.shape[-1])
                latents = self.head.sample(z, float(step.number), step, noise, batch, config.tokens, config.channels)
            return latents
        orders, masked = noise.orders(config.tokens), config.tokens
        for step in plan:
            drawn = int(step.tokens)
            visible = np.sort(orders[:, masked:], axis=1)
            masked -= drawn
            predicted = torch.from_numpy(np.sort(orders[:, masked : masked + drawn], axis=1))
            restore = restore_index(visible, config.tokens)
            z = self.transformer(latents, both, torch.from_numpy(visible), torch.from_numpy(restore))
            wanted = torch.cat([predicted, predicted]).unsqueeze(-1)
            z = z.gather(1, wanted.expand(-1, -1, z.shape[-1])).reshape(-1, z.shape[-1])
            sample = self.head.sample(z, None, step, noise, batch, drawn, config.channels)
            latents = latents.scatter(1, predicted.unsqueeze(-1).expand(-1, -1, config.channels), sample)
        return latents

    def indices(self, noise: NoiseSource, count: int) -> tuple[Tensor, Tensor]:
        """visible and restore [B, ...] where `count` tokens are seen."""
        found = visible_tokens(noise.orders(self.model.config.tokens), count)
        return torch.from_numpy(found[0]), torch.from_numpy(found[1])


class ReleasedVAR:
    """VAR's loop, guided throughout; top-k and top-p as the official sampling does them."""

    def __init__(self, var: VAR, vqvae: VQVAE, amp: bool = False, compiled: bool = False) -> None:
        self.var, self.vqvae, self.amp = var, vqvae.with_scales(var.config.patch_nums), amp
        self.blocks = [torch.compile(block) if compiled else block for block in var.blocks]

    def sample(self, labels: Sequence[int], noise: NoiseSource, guidance: float, top_k: int, top_p: float) -> Tensor:
        """The feature map [B, L, C]."""
        var, config, quantizer = self.var, self.var.config, self.vqvae.quantize
        batch, scales = len(labels), config.patch_nums
        condition = var.class_emb(torch.tensor([*labels, *[config.classes] * batch]))
        latents = torch.zeros(batch, scales[-1] ** 2, config.channels)
        x = var.first_input(condition)
        caches: list[KeyValueCache | None] = [None] * config.depth
        ranges = token_ranges(scales)
        for i, (start, end) in enumerate(ranges):
            with autocast(self.amp):
                for j, block in enumerate(self.blocks):
                    modulation = var.blocks[j].modulation(condition)
                    x, caches[j] = block(x, modulation, caches[j])
                logits = var.head(var.head_nm(x, var.head_nm.modulation(condition)))
            logits = logits.float()
            gain = guidance * progress(i, len(scales))
            logits = (1 + gain) * logits[:batch] - gain * logits[batch:]
            drawn = torch.from_numpy(noise.gumbel(i, end - start, config.vocabulary))
            tokens = (filtered(logits, top_k, top_p) + drawn).argmax(-1)
            cells = quantizer.up[start:end].transpose(0, 1) @ quantizer.embedding(tokens)
            latents = latents + quantizer.apply_phi(cells, quantizer.quant_resi.qresi_ls[self._phi(i)])
            if i + 1 < len(scales):
                after = slice(*ranges[i + 1])
                x = var.word_embed(quantizer.down[after] @ latents) + var.positions()[after]
                x = torch.cat([x, x])
        return latents

    def _phi(self, scale: int) -> int:
        return phi_index(scale, len(self.var.config.patch_nums), self.vqvae.config.phis)


def filtered(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits with minus infinity for what top-k and then top-p leave out (sample_with_top_k_top_p_ in helpers.py)."""
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k)[0][..., -1:], -torch.inf)
    if top_p:
        rising, order = logits.sort(dim=-1, descending=False)
        removed = rising.softmax(-1).cumsum(-1) <= 1 - top_p
        removed[..., -1:] = False
        logits = logits.masked_fill(removed.scatter(-1, order, removed), -torch.inf)
    return logits
