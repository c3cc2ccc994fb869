"""The diffusion head: an MLP with adaptive LayerNorm that denoises one token under its condition (official
models/diffloss.py)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from far_models.islands import island

SINUSOIDS = 256
"""Width of the timestep's sinusoidal embedding."""


def timestep_sinusoids(t: Tensor) -> Tensor:
    """Sinusoidal embedding [..., 256] of timesteps t [...] (0 to 999), in float32 at every precision."""
    island("timestep_sinusoids")
    half = SINUSOIDS // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float().unsqueeze(-1) * frequencies
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return x * (1 + scale) + shift


class TimeEmbed(nn.Module):
    """Embedding [..., width] of timesteps [...]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(SINUSOIDS, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        out: Tensor = self.mlp(timestep_sinusoids(t).to(self.mlp[0].weight.dtype))
        return out


class ResBlock(nn.Module):
    """Residual MLP block over x [..., width], modulated by y [..., width] (AdaLN: shift, scale, gate)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(modulate(self.in_ln(x), shift, scale))


class FinalLayer(nn.Module):
    """LayerNorm of x [..., width] modulated by y [..., width], then Linear to [..., out]."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        out: Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        return out


class DiffusionHead(nn.Module):
    """SimpleMLPAdaLN of the official code in two parts: `condition`, which is the same for all diffusion steps of a
    level, and `forward`, which runs at every step.

    levels=False makes MAR's head, which has no level embedding.
    """

    def __init__(self, channels: int, z_width: int, width: int, depth: int, levels: bool = True) -> None:
        super().__init__()
        self.channels = channels
        self.time_embed = TimeEmbed(width)
        self.cond_embed = nn.Linear(z_width, width)
        if levels:
            self.index_cond_embed = nn.Linear(1, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * channels)

    def condition(self, z: Tensor, level: Tensor | None = None) -> Tensor:
        """Head condition [..., width] of z [..., z_width] and the level, which is broadcast against z[..., :1]."""
        condition: Tensor = self.cond_embed(z)
        if level is not None:
            condition = condition + self.index_cond_embed(level.to(z.dtype))
        return condition

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Prediction and variance values [..., 2 C] of noisy tokens x [..., C] at timesteps t [...] under the condition
        [..., width]."""
        y = self.time_embed(t) + condition
        x = self.input_proj(x)
        for block in self.res_blocks:
            x = block(x, y)
        out: Tensor = self.final_layer(x, y)
        return out

    def initialize(self) -> None:
        """Official initialisation: Xavier linears, N(0, 0.02) time embedding, zero modulations and output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for index in (0, 2):
            nn.init.normal_(self.time_embed.mlp[index].weight, std=0.02)
        zeroed = [block.adaLN_modulation[-1] for block in self.res_blocks]
        for layer in [*zeroed, self.final_layer.adaLN_modulation[-1], self.final_layer.linear]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


class DiffLoss(nn.Module):
    """The module that gives the head its official name, `diffloss.net`."""

    def __init__(self, channels: int, z_width: int, width: int, depth: int, levels: bool = True) -> None:
        super().__init__()
        self.net = DiffusionHead(channels, z_width, width, depth, levels)
