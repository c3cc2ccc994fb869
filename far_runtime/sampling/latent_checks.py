"""Checks of the latents that a loop ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from far_runtime.errors import Message, NotFinite, SettingName, join_texts
from far_runtime.sampling.base import Plan

LARGEST_DEVIATION = 10.0
"""Standard deviation of latents, whose scale is about 1, above which a warning is given. A network that is far off at
the first timestep leaves hundreds of times that."""


def check_finite(latents: NDArray[np.float32], samplings: Sequence[Mapping[str, Any]]) -> None:
    """NotFinite, with the sampling settings of the pictures, for latents that are not finite."""
    if np.isfinite(latents).all():
        return
    scales = tuple(dict.fromkeys(sampling["guidance"] for sampling in samplings))
    settings = {**samplings[0], "guidance": scales if len(scales) > 1 else scales[0]}
    used = join_texts((Message(SettingName(name), f" {value}") for name, value in settings.items()), ", ")
    raise NotFinite(
        "the latents are not finite with ", used, "; try less ", SettingName("guidance"),
        ", or far verify to see where it begins",
    )  # fmt: skip


def unsteady(plan: Plan, latents: NDArray[np.float32]) -> tuple[str, ...]:
    """A warning where a diffusion system's latents [B, L, C] are far larger than any that it was trained on."""
    deviation = float(latents.std())
    if plan[0].diffusion is None or deviation <= LARGEST_DEVIATION:
        return ()
    warning = Message(
        f"the latents' standard deviation is {deviation:.0f} where about 1 is right: the network may be unsteady at "
        "the first diffusion steps; try ", SettingName("start"), " 950, a ", SettingName("preset"),
        " other than official, or less ", SettingName("guidance"),
    )  # fmt: skip
    return (warning,)
