"""The sampling settings of all systems, as options."""

from __future__ import annotations

from typing import Any

SAMPLING: dict[str, dict[str, Any]] = {
    "preset": {
        "metavar": "NAME",
        "help": "official, quality, balanced or fast: settings that the other options may change. far tune finds a "
        "bundle's own.",
    },
    "levels": {"metavar": "N,N,...", "help": "FAR: levels from low to high frequency."},
    "shared_noise": {
        "type": int,
        "metavar": "LEVEL",
        "help": "FAR: the tokens of levels below this one share their noise; 1 for models that were trained with "
        "--first mean. Default: the model's, or 0.",
    },
    "iterations": {"type": int, "metavar": "N", "help": "MAR: iterations, 1 to the number of tokens."},
    "steps": {
        "metavar": "N|A:B|N,N,...",
        "help": "Diffusion steps: N at every level or iteration, from A at the first to B at the last, or one by one.",
    },
    "solver": {
        "metavar": "NAME|NAME,...",
        "help": "ddpm (the official one), ddim, dpmpp-2m or dpmpp-2m-sde, at every level or iteration or one by one.",
    },
    "start": {
        "type": int,
        "metavar": "T",
        "help": "Timestep of the first diffusion step. Default: 999; where the model predicts epsilon, 950 for solvers "
        "other than ddpm.",
    },
    "guidance": {"type": float, "metavar": "SCALE", "help": "Classifier-free guidance at the end of its rise."},
    "guidance_floor": {
        "type": float,
        "metavar": "SCALE",
        "help": "Steps whose guidance is not above it run without: their unconditional half is left out. Default: 1.",
    },
    "guidance_schedule": {"metavar": "linear|constant", "help": "MAR: whether guidance rises with what is known."},
    "temperature": {"type": float, "metavar": "T", "help": "Factor of the sampler's noise."},
    "top_k": {"type": int, "metavar": "N", "help": "VAR: draw from the N likeliest tokens; 0: from all."},
    "top_p": {
        "type": float,
        "metavar": "P",
        "help": "VAR: draw from the likeliest tokens that make up P; 0: from all.",
    },
    "more_smooth": {"type": bool, "metavar": "true|false", "help": "VAR: mix codes for smoother pictures."},
}
"""Every setting of any system, and the preset; which of them a bundle takes, its system's `SETTINGS` say."""
