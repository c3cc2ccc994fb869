"""How engines are built, and what TensorRT-RTX cannot do of it."""

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
"""The most profiles of a graph by default. 12: the masked FAR's 11 steps and a profile for all else. TensorRT-RTX fits
its kernels to the shapes that it meets when it runs, and an engine has all of its kernels once per profile."""

NOT_IN_RTX = {
    "optimization_level": "TensorRT-RTX takes it and builds the same bytes",
    "timing_cache": "TensorRT-RTX times nothing while it builds (deprecated there since 1.2)",
    "version_compatible": "TensorRT-RTX has no lean runtime",
    "hardware_compatible": Message("TensorRT-RTX takes a list of GPUs in its place, ", SettingName("target")),
}
"""What is refused there, and why; tried with TensorRT-RTX 1.7."""


@dataclass(frozen=True)
class BuildOptions:
    """Settings of a build.

    targets: compute capabilities ("sm89"), TensorRT-RTX only; none: the GPU here. batch: smallest, usual and largest
    number of pictures at once; None: what the stages were exported with. profiles: the most optimisation profiles of a
    graph; None: PROFILES. workspace: MiB that a layer may use; None: all. timing_cache: a file; None: the user's.
    refittable: new weights can be put in; stripped: without weights, which the bundle gives when the engine is loaded.
    weight_streaming: weights may stay on the host in part (how much: an option of the run).
    """

    targets: tuple[str, ...] = ()
    batch: tuple[int, int, int] | None = None
    profiles: int | None = None
    optimization_level: int | None = None
    workspace: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: str | None = None
    refittable: bool = False
    stripped: bool = False
    weight_streaming: bool = False

    def flags(self) -> dict[str, Any]:
        """What changes the engine beside its shapes and targets, for the cache's key."""
        names = ("optimization_level", "workspace", "version_compatible", "hardware_compatible", "refittable",
                 "stripped", "weight_streaming")  # fmt: skip
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None and value is not False}


def check_options(library: str, options: BuildOptions) -> None:
    """FarError for options that the library has not, that contradict each other, or that are out of range."""
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
