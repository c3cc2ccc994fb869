"""Rows of a batch by their numbers, as graphs select them, and tokens put into latents."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """x [B, ...] at index [n]: exported as Gather, where indexing with brackets would become GatherND."""
    return x.index_select(0, index)


def repeat_for_guidance(x: Tensor, rows: int) -> Tensor:
    """x [B, ...] repeated to [rows, ...], rows = B or 2 B: the conditional rows, then the unconditional ones of the
    same pictures."""
    pictures = torch.arange(x.shape[0], device=x.device)
    index = gather_rows(torch.cat([pictures, pictures]), torch.arange(rows, device=x.device))
    return gather_rows(x, index)


class PlaceStageModule(nn.Module):
    """latents [B, L, C], sample [B, T, C], index [B, N] -> [B, N, C]: at every position the token of that number among
    the latents' and then the sample's."""

    def forward(self, latents: Tensor, sample: Tensor, index: Tensor) -> Tensor:
        tokens = torch.cat([latents, sample], dim=1)
        return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
