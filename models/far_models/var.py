"""VAR: the transformer that predicts the next token map from all coarser ones (arXiv 2404.02905; official
models/var.py and models/basic_var.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from far_models.islands import island, softmax
from far_runtime.sampling.pyramid import SCALES_256, SCALES_512, token_ranges

MAX_SCALE = math.log(100)
EPS = 1e-6

KeyValueCache = tuple[Tensor, Tensor]
"""Keys and values [B, heads, past, d] of one block."""


@dataclass(frozen=True)
class VARConfig:
    """Sizes and variant of a VAR model."""

    patch_nums: tuple[int, ...] = SCALES_256
    """Sides of the token maps, from the coarsest scale to the finest."""
    channels: int = 32
    """Channels of the VQ-VAE's codes."""
    vocabulary: int = 4096
    """Codes of the VQ-VAE."""
    classes: int = 1000
    """Class labels; the label `classes` is the null class."""
    width: int = 1024
    depth: int = 16
    heads: int = 16
    mlp_ratio: float = 4.0
    shared_aln: bool = False
    """Whether all blocks share one modulation layer, with an offset in each."""
    attn_l2_norm: bool = True
    """Whether queries and keys are normalised, with a learned scale per head."""

    @property
    def tokens(self) -> int:
        """Tokens of all scales."""
        return sum(side * side for side in self.patch_nums)

    @property
    def first_tokens(self) -> int:
        """Tokens of the first scale."""
        return self.patch_nums[0] ** 2


def preset(depth: int, **changes: object) -> VARConfig:
    """VAR of a released depth (16, 20, 24, 30, or 36 for the 512 px model): as many heads as blocks, 64 wide each."""
    config = VARConfig(width=64 * depth, depth=depth, heads=depth)
    if depth == 36:
        config = replace(config, patch_nums=SCALES_512, shared_aln=True)
    return replace(config, **changes)  # type: ignore[arg-type]


class Attention(nn.Module):
    """Multi-head self-attention over [B, T, width] and the cached coarser scales; keys have no bias."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        width, self.heads = config.width, config.heads
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)
        if config.attn_l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, config.heads, 1, 1), math.log(4.0)))

    def forward(
        self, x: Tensor, past: KeyValueCache | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, KeyValueCache]:
        """Output [B, T, width], and the cache with the keys and values of x.

        bias [T, past + T] is added to the logits.
        """
        _, length, width = x.shape
        bias_qkv = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = functional.linear(x, self.mat_qkv.weight, bias_qkv)
        # Each [B, heads, T, d].
        q, k, v = qkv.reshape(-1, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        if hasattr(self, "scale_mul_1H11"):
            island("normalize")
            gain = self.scale_mul_1H11.float().clamp(max=MAX_SCALE).exp()
            q = (functional.normalize(q.float(), dim=-1) * gain).to(x.dtype)
            k = functional.normalize(k.float(), dim=-1).to(x.dtype)
        else:
            q = q * (0.25 * q.shape[-1] ** -0.5)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        x = attend(q, k, v, bias).transpose(1, 2).reshape(-1, length, width)
        return self.proj(x), (k, v)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T + bias) v of [B, heads, T, d] tensors, with q already scaled; written out as in `blocks.attend`."""
    if q.is_cuda and not torch.compiler.is_exporting():
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
    logits = q @ k.transpose(-2, -1)
    return softmax(logits if bias is None else logits + bias) @ v


class FeedForward(nn.Module):
    """Linear, GELU (tanh), Linear over [B, T, width]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))
        return out


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LayerNorm without weights of x [B, T, width], then scale and shift [B, 1, width]."""
    island("layer_norm")
    normed = functional.layer_norm(x.float(), x.shape[-1:], eps=EPS).to(x.dtype)
    return normed * (scale + 1) + shift


class Block(nn.Module):
    """Transformer block whose norms and residual gains depend on the class (AdaLN)."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        width = config.width
        self.attn = Attention(config)
        self.ffn = FeedForward(width, round(width * config.mlp_ratio))
        if config.shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def modulation(self, condition: Tensor) -> Tensor:
        """Modulation [B, 6, width] (gains of attention and MLP, then their scales, then their shifts) of the class
        embedding [B, width], or of the shared layer's output [B, 6, width]."""
        if hasattr(self, "ada_gss"):
            return condition + self.ada_gss[0]
        out: Tensor = self.ada_lin(condition)
        return out.unflatten(-1, (6, -1))

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        past: KeyValueCache | None = None,
        bias: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> tuple[Tensor, KeyValueCache]:
        """Output [B, T, width] and the cache. keep [B, 1, 1]: factor of the branches, for stochastic depth."""
        gain1, gain2, scale1, scale2, shift1, shift2 = modulation.split(1, dim=1)
        if keep is not None:
            gain1, gain2 = gain1 * keep, gain2 * keep
        out, cache = self.attn(modulated(x, scale1, shift1), past, bias)
        x = x + out * gain1
        return x + self.ffn(modulated(x, scale2, shift2)) * gain2, cache


class HeadNorm(nn.Module):
    """The norm before the head, which depends on the class (AdaLN)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def modulation(self, condition: Tensor) -> Tensor:
        """Modulation [B, 2, width] (scale, shift) of the class embedding [B, width]."""
        out: Tensor = self.ada_lin(condition)
        return out.unflatten(-1, (2, -1))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        scale, shift = modulation.split(1, dim=1)
        return modulated(x, scale, shift)


class VAR(nn.Module):
    """Decoder-only transformer over the token maps of all scales; each scale attends to itself and to coarser ones.

    Parameters have the official names, so that `load_state_dict` takes an official checkpoint without its buffers.
    """

    def __init__(self, config: VARConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.drop_path = drop_path
        self.ranges = token_ranges(config.patch_nums)
        width = config.width
        self.word_embed = nn.Linear(config.channels, width)
        self.class_emb = nn.Embedding(config.classes + 1, width)
        self.pos_start = nn.Parameter(torch.zeros(1, config.first_tokens, width))
        self.pos_1LC = nn.Parameter(torch.zeros(1, config.tokens, width))
        self.lvl_embed = nn.Embedding(len(config.patch_nums), width)
        if config.shared_aln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_nm = HeadNorm(width)
        self.head = nn.Linear(width, config.vocabulary)

    def modulations(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Modulation of all blocks [B, depth, 6, width] and the head [B, 2, width] by class embeddings [B, width]."""
        shared = self.shared_ada_lin(condition).unflatten(-1, (6, -1)) if self.config.shared_aln else condition
        return torch.stack([block.modulation(shared) for block in self.blocks], 1), self.head_nm.modulation(condition)

    def positions(self) -> Tensor:
        """Position and level embeddings [L, width] of all tokens."""
        sides = [side * side for side in self.config.patch_nums]
        weight = self.lvl_embed.weight
        return torch.cat([weight[i : i + 1].expand(n, -1) for i, n in enumerate(sides)]) + self.pos_1LC[0]

    def first_input(self, condition: Tensor) -> Tensor:
        """The first scale's input [B, first_tokens, width] of class embeddings [B, width]."""
        return condition.unsqueeze(1) + self.pos_start + self.positions()[: self.config.first_tokens]

    def features(self, labels: Tensor, inputs: Tensor) -> Tensor:
        """Input of the head [B, L, width] for all scales at once, for training.

        labels [B].
        inputs [B, L - first_tokens, channels]: the feature map after every scale but the last, resized to the scale
        after it (`Quantizer.inputs`).

        In training mode every block but the first is dropped for some pictures, the last with probability `drop_path`.
        """
        condition = self.class_emb(labels)
        modulation, head_modulation = self.modulations(condition)
        later = self.word_embed(inputs) + self.positions()[self.config.first_tokens :]
        x = torch.cat([self.first_input(condition), later], dim=1)
        bias = self.causal_bias().to(x.device)
        for i, block in enumerate(self.blocks):
            x, _ = block(x, modulation[:, i], bias=bias, keep=self._stochastic_depth(x, i))
        out: Tensor = self.head_nm(x, head_modulation)
        return out

    def forward(self, labels: Tensor, inputs: Tensor) -> Tensor:
        """Logits [B, L, vocabulary] for all scales at once, for training; parameters as in `features`."""
        out: Tensor = self.head(self.features(labels, inputs))
        return out

    def causal_bias(self) -> Tensor:
        """[L, L]: 0 where the row's token attends to the column's (same scale or coarser), else minus infinity."""
        scale = torch.cat([torch.full((end - start,), i) for i, (start, end) in enumerate(self.ranges)])
        return torch.zeros(len(scale), len(scale)).masked_fill(scale[:, None] < scale[None, :], -math.inf)

    def _stochastic_depth(self, x: Tensor, block: int) -> Tensor | None:
        """Factors [B, 1, 1] of a block's branches: 0 for pictures that drop it; None outside of training."""
        rate = self.drop_path * block / max(self.config.depth - 1, 1)
        if not self.training or not rate:
            return None
        return x.new_empty(x.shape[0], 1, 1).bernoulli_(1 - rate) / (1 - rate)

    def initialize(self, gain: float = 1e-5) -> VAR:
        """Official initialisation (init_weights with the trainer's settings); returns self.

        gain: factor of the branches' residual gains (the trainer's `alng`).
        """
        std = (1 / self.config.width / 3) ** 0.5
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for table in (self.pos_start, self.pos_1LC):
            nn.init.trunc_normal_(table, std=std)
        with torch.no_grad():
            self.head.weight *= 0.02
            self.head_nm.ada_lin[1].weight *= 0.5
            for block in self.blocks:
                block.attn.proj.weight /= math.sqrt(2 * self.config.depth)
                block.ffn.fc2.weight /= math.sqrt(2 * self.config.depth)
                gains = block.ada_gss[0, 0] if self.config.shared_aln else block.ada_lin[1].weight.unflatten(0, (6, -1))
                gains[2:] *= 0.5
                gains[:2] *= gain
        return self
