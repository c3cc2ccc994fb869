"""Sheets of reconstructions, and how close they are, while an autoencoder is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import nn

from far_models.pictures import PictureSet
from far_models.reconstruction import comparison, decode_pixels, evenly, psnr, reconstruction_psnr, save_picture
from far_training.data.redrawn import RedrawnSet
from far_training.loop.task import Report

SHEET_PICTURES = 32
MEASURED_PICTURES = 128


def reconstruction_reporter(sets: Sequence[PictureSet], redrawn: RedrawnSet | None = None) -> Report:
    """A task's `report`: a sheet of reconstructions, and their PSNR on training and held-out pictures.

    With redrawn latents of the first set it also measures the pictures that are decoded from their first draw.
    """
    first = sets[0]

    def report(model: nn.Module, step: int, folder: Path) -> dict[str, float]:
        sheet = comparison(model, first, evenly(first.train, SHEET_PICTURES))
        save_picture(sheet, folder / "sheets" / f"reconstruction-{step:06d}.png")
        rows = evenly(first.train, MEASURED_PICTURES)
        numbers = {"psnr_train": reconstruction_psnr(model, first, rows)}
        held_out = [(p, evenly(p.held_out, MEASURED_PICTURES)) for p in sets if len(p.held_out)]
        if held_out:
            values = [reconstruction_psnr(model, pictures, held_out_rows) for pictures, held_out_rows in held_out]
            weights = [min(len(p.held_out), MEASURED_PICTURES) for p, _ in held_out]
            numbers["psnr_held_out"] = float(np.average(values, weights=weights))
        if redrawn is not None:
            decoded = decode_pixels(model, redrawn.latents(rows, np.zeros_like(rows)))
            numbers["psnr_redrawn"] = psnr(decoded, first.read(rows))
        return numbers

    return report
