"""Options of a build with TensorRT, and which of them TensorRT-RTX lacks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from far_runtime.errors import FarError, Message, SettingName

LIBRARIES = ("tensorrt", "tensorrt-rtx")
PORTABLE = ("ampere+", "same-cc")
MAX_LEVEL = 5
PROFILES = {"tensorrt": 12, "tensorrt-rtx": 1}
"""Most optimisation profiles of a graph by default.

12 is enough for the 11 steps of the masked FAR and one profile for all other shapes. TensorRT-RTX compiles kernels for
the shapes that it meets at run time, and an engine holds all of its kernels once for every profile.
"""

NOT_IN_RTX = {
    "optimization_level": "TensorRT-RTX takes it and builds the same bytes",
    "timing_cache": "TensorRT-RTX times nothing while it builds (deprecated there since 1.2)",
    "version_compatible": "TensorRT-RTX has no lean runtime",
    "hardware_compatible": Message("TensorRT-RTX takes a list of GPUs in its place, ", SettingName("target")),
}
"""Options that are refused with TensorRT-RTX, and why; tried with TensorRT-RTX 1.7."""


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build."""

    targets: tuple[str, ...] = ()
    """Compute capabilities ("sm89") that TensorRT-RTX builds for; empty: that of the GPU here."""
    batch: tuple[int, int, int] | None = None
    """Smallest, usual and largest number of pictures at once; None: those that the stages were exported with."""
    profiles: int | None = None
    """Most optimisation profiles of a graph; None: `PROFILES`."""
    optimization_level: int | None = None
    """How long TensorRT searches for kernels, 0 to 5; None: its default."""
    workspace: int | None = None
    """MiB of GPU memory that a layer may use; None: all."""
    timing_cache: Path | None = None
    """TensorRT's timing cache; None: a file in the user's cache folder."""
    version_compatible: bool = False
    """Whether later versions of TensorRT load the engine too."""
    hardware_compatible: str | None = None
    """Which other GPUs run the engine, one of `PORTABLE`; None: only GPUs like the one that it was built on."""
    refittable: bool = False
    """Whether the engine's weights can be replaced."""
    stripped: bool = False
    """Whether the engine file has no weights; the bundle's are put in when the engine is loaded."""
    weight_streaming: bool = False
    """Whether a part of the weights may stay on the host; how large a part is an option of the run."""

    def flags(self) -> dict[str, Any]:
        """The options that change the engine besides shapes and targets; they belong to the cache's key."""
        names = ("optimization_level", "workspace", "version_compatible", "hardware_compatible", "refittable",
                 "stripped", "weight_streaming")  # fmt: skip
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None and value is not False}


def check_options(library: str, options: BuildOptions) -> None:
    """FarError for options that the library lacks, that contradict each other, or that are out of range."""
    if library not in LIBRARIES:
        raise FarError(SettingName("engine"), f" {library}: is not built ahead; known: {', '.join(LIBRARIES)}")
    if options.batch is not None:
        low, usual, high = options.batch
        if not 1 <= low <= usual <= high:
            raise FarError(
                SettingName("batch"), f" {low}:{usual}:{high}: expected 1 <= smallest <= usual <= largest, as 1:4:8"
            )
    if options.stripped and options.refittable:
        raise FarError(
            SettingName("weight_stripped"), ": is refittable already; leave ", SettingName("refittable"), " out"
        )
    if library == "tensorrt" and options.targets:
        raise FarError(
            SettingName("target"),
            ": TensorRT builds for the GPU that it runs on; leave it out, or build with ",
            SettingName("engine"),
            " tensorrt-rtx",
        )
    if library == "tensorrt-rtx":
        for name, reason in NOT_IN_RTX.items():
            if getattr(options, name) is not None and getattr(options, name) is not False:
                raise FarError(
                    SettingName(name),
                    ": ",
                    reason,
                    "; leave it out, or build with ",
                    SettingName("engine"),
                    " tensorrt",
                )
    for target in options.targets:
        if not re.fullmatch(r"sm\d{2,3}", target):
            raise FarError(SettingName("target"), f" {target}: expected compute capabilities such as sm86,sm89,sm120")


def capability(target: str) -> tuple[int, int]:
    """ "sm120" -> (12, 0)."""
    digits = target.removeprefix("sm")
    return int(digits[:-1]), int(digits[-1])
