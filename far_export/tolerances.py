"""The errors that each precision may have against the float32 torch modules.

In FP32 the stages have tolerances of their own, and the limits of the free run follow from these: LOOP_FACTOR times the
largest tolerance of the loop's stages for the latents (1e-3), and the PSNR that `required_psnr` gives for that (40 dB).

At a lower precision every stage in lockstep has the limit of that precision. The free run has a limit where pictures
can be compared one by one:

- FAR, FAR-T2I and MAR draw from the same noise on both sides, so pictures stay close. LIMITS has what they need.
- VAR draws tokens. Where two tokens were nearly as likely, a rounding error may choose the other one, which leads to a
  picture that is different and as good. In lockstep every scale is compared on the reference's own tokens; the free run
  is only shown.
- INT8 is compared by the distribution of its pictures (`far_export.verify.distribution`); the free run is only shown.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from far_export.stages.stage import Stage

LOOP_FACTOR = 10.0


@dataclass(frozen=True)
class Limits:
    """What a precision needs to pass."""

    stage: float
    """The largest relative error of any call of a stage in lockstep."""
    loop: float
    """The largest relative error of the free run's latents after any step."""
    psnr: float
    """PSNR of every picture in dB."""


# The worst figures measured on far-emoji-64, which is trained (scripts/studies/check_precision.py, 8 pictures;
# docs/precision.md), and on tiny random models of all systems. FP16, in FP16 arithmetic: stages 9.0e-4, loop 2e-3,
# pictures 48.9 dB. BF16: stages 8.8e-3, loop 7.7e-2, pictures 33.1 dB. INT8: stages 2.6e-2. The loop's error depends on
# the picture, hence its wider margin. Deeper networks add up more rounding errors than its 8 blocks.
LIMITS = {
    "fp16": Limits(stage=1e-2, loop=0.1, psnr=35.0),
    "bf16": Limits(stage=5e-2, loop=0.3, psnr=28.0),
    "int8": Limits(stage=0.1, loop=math.inf, psnr=-math.inf),
}


def stage_tolerance(stage: Stage, precision: str) -> float:
    """The relative error that a stage may have whose matrix products have that precision; at least the stage's own
    tolerance."""
    return stage.tolerance if precision == "fp32" else max(stage.tolerance, LIMITS[precision].stage)


def free_run_limits(precision: str, draws_tokens: bool, tolerance: float, scale: float) -> tuple[float, float]:
    """The largest relative error of the free run's latents, and the PSNR in dB that its pictures need; both infinite
    where the free run is only shown.

    tolerance: the largest tolerance of the loop's stages, `scale` included.
    """
    if precision == "fp32":
        return LOOP_FACTOR * tolerance, required_psnr(LOOP_FACTOR * tolerance)
    if draws_tokens:
        return math.inf, -math.inf
    limits = LIMITS[precision]
    return limits.loop * scale, limits.psnr - 20 * math.log10(scale)


def required_psnr(loop_limit: float) -> float:
    """The PSNR in dB that a picture needs where its latents may have the relative error `loop_limit`.

    40 dB for 1e-3, and 20 dB less for ten times the error, but never below 25 dB, where differences become visible.
    """
    return min(40.0, max(25.0, -20.0 - 20.0 * math.log10(loop_limit)))
