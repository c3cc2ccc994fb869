"""What an export is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from far_export.verify.acceptance import verifying_engine
from far_runtime.bundle import CALIBRATION_PICTURES, PRECISIONS
from far_runtime.errors import FarError, SettingName


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What `export_bundle` can be asked for."""

    weights: str | None = None
    """Which weights of a .pth file: "model_ema" or "model". None: model_ema, or model where there is no model_ema."""

    overrides: Mapping[str, Any] | None = None
    """Settings of the network that its weights do not show, by name."""

    levels: str = "shared"
    """ "shared": one transformer graph that takes the level as an input. "per-level": one graph for each step of the
    default schedule, with the constants of its level folded in."""

    defaults: Mapping[str, Any] | None = None
    """Default sampling settings of the bundle, in place of the checkpoint's own and the official ones."""

    classes: Sequence[str] = ()
    """Class names by label, in place of the checkpoint's own."""

    editing: bool = True
    """Whether the bundle gets the stages that `far edit` needs."""

    text_encoder: str | Path | None = None
    """Hugging Face folder of the text encoder, for a text-to-image model."""

    precision: str = "fp32"
    """Precision of matrix products and convolutions, one of PRECISIONS."""

    calibrate: int | None = None
    """Number of pictures that int8 is calibrated on. None: CALIBRATION_PICTURES."""

    verify_steps: str | None = None
    """Diffusion steps of the picture that a bundle below FP32 is verified with. None: the bundle's default steps."""

    presets: Mapping[str, dict[str, Any]] | None = None
    """Sampling presets that `far tune` has found for these weights, by name."""

    report: Callable[[str], None] = lambda line: None
    """Called with a line of text after each part of the work."""

    def check(self) -> None:
        """FarError for an unknown precision, for options that belong to another precision, and where the engine that
        verifies this precision is not installed."""
        if self.precision not in PRECISIONS:
            raise FarError(f"precision {self.precision!r}: unknown; known: {', '.join(PRECISIONS)}")
        if self.calibrate is not None and self.precision != "int8":
            raise FarError(
                SettingName("calibrate"), f" {self.calibrate}: only int8 is calibrated; leave it out, or add ",
                SettingName("precision"), " int8",
            )  # fmt: skip
        if self.precision != "fp32":
            verifying_engine(self.precision)
        elif self.verify_steps is not None:
            raise FarError(
                SettingName("verify_steps"),
                f" {self.verify_steps}: an fp32 export draws no picture to verify; leave it out",
            )

    @property
    def calibration_pictures(self) -> int:
        """Number of pictures that int8 is calibrated on."""
        return self.calibrate or CALIBRATION_PICTURES
