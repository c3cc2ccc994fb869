"""Sampling schedules: FAR's levels, and the diffusion steps, solver, guidance and temperature of every step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from far_runtime.errors import FarError, SettingName
from far_runtime.sampling.solvers import SOLVERS, Diffusion

OFFICIAL_GRID = 16
OFFICIAL_LEVELS = (0, 2, 3, 4, 5, 6, 7, 8, 9, 10)
OFFICIAL_MASKED_LEVELS = (0, 12, 12, 4, 5, 6, 7, 8, 9, 10, 11)

T = TypeVar("T")


@dataclass(frozen=True)
class Schedule:
    """FAR's steps, from coarse to fine; each field has one entry per step."""

    levels: tuple[int, ...]
    """Frequency level of the step's input; 0: nothing is drawn yet."""
    diffusion: tuple[Diffusion, ...]
    """How the step draws from the diffusion head."""
    guidance: tuple[float, ...]
    """Scale of classifier-free guidance; 1: none."""

    def __len__(self) -> int:
        return len(self.levels)


def official_levels(grid: int, masked: bool) -> tuple[int, ...]:
    """The released code's level list for a 16 x 16 grid; for another grid all levels, 0 to grid - 1."""
    if grid != OFFICIAL_GRID:
        return tuple(range(grid))
    return OFFICIAL_MASKED_LEVELS if masked else OFFICIAL_LEVELS


def make_schedule(settings: Mapping[str, Any], masked: bool) -> Schedule:
    """The schedule of `sample_tokens_nomask` or `sample_tokens_mask` (official models/far.py) for any level list.

    Guidance rises linearly, 1 + (guidance - 1) i / n at step i of n. The temperature is 0.8 + (T - 0.8)(1 - cos(pi/2
    (i + 1)/n)), of a masked model 0.85 + (T - 0.85) i / n. FarError for steps and solvers that do not fit the levels.
    """
    levels, guidance, temperature = settings["levels"], settings["guidance"], settings["temperature"]
    n, floor = len(levels), settings.get("guidance_floor", 1.0)
    if masked:
        temperatures = [0.85 + (temperature - 0.85) * i / n for i in range(n)]
    else:
        temperatures = [0.8 + (temperature - 0.8) * (1 - math.cos(math.pi / 2 * (i + 1) / n)) for i in range(n)]
    return Schedule(
        levels=tuple(levels),
        diffusion=make_diffusion(settings, temperatures),
        guidance=tuple(floored(1 + (guidance - 1) * i / n, floor) for i in range(n)),
    )


def make_diffusion(
    settings: Mapping[str, Any], temperatures: Sequence[float], unit: str = "levels"
) -> tuple[Diffusion, ...]:
    """How each step of the loop draws from the diffusion head; `temperatures` has one entry per step.

    `unit` is what error messages call the steps of the loop. FarError for steps and solvers that do not fit them.
    """
    count, start = len(temperatures), settings.get("start")
    steps = parse_steps(settings["steps"], count, unit)
    solvers = parse_solvers(settings.get("solver", "ddpm"), count, unit)
    if start is not None and max(steps) > start + 1:
        raise FarError(
            SettingName("start"), f" {start}: leaves {start + 1} timesteps for {max(steps)} steps; use fewer ",
            SettingName("steps"),
        )  # fmt: skip
    return tuple(
        Diffusion(number, solver, start, temperature)
        for number, solver, temperature in zip(steps, solvers, temperatures, strict=True)
    )


def floored(guidance: float, floor: float) -> float:
    """A scale of guidance, or 1, no guidance, where it is not above the floor."""
    return 1.0 if 1.0 <= guidance <= floor else guidance


def resolve_steps(values: Mapping[str, Any], count: int, unit: str = "levels") -> dict[str, Any]:
    """The settings `steps` and `solver` of a loop of `count` steps as JSON values; FarError where they do not fit."""
    diffusion = make_diffusion(values, [1.0] * count, unit)
    return {
        "steps": compact([step.steps for step in diffusion]),
        "solver": compact([step.solver for step in diffusion]),
    }


def compact(values: Sequence[T]) -> T | list[T]:
    """Values per step of the loop as they are recorded: a single value where all are equal, which fits any loop."""
    return values[0] if len(set(values)) == 1 else list(values)


def parse_solvers(solver: str | Sequence[str], count: int, unit: str = "levels") -> tuple[str, ...]:
    """`count` solvers from one name, or from one per step of the loop in a list or with commas between.

    FarError for an unknown name, and for another number of names.
    """
    names = [name.strip() for name in solver.split(",")] if isinstance(solver, str) else list(solver)
    for name in names:
        if name not in SOLVERS:
            raise FarError(SettingName("solver"), f" {name}: unknown; known: {', '.join(SOLVERS)}")
    if len(names) not in (1, count):
        raise FarError(
            SettingName("solver"),
            f" names {len(names)} {unit}, the schedule has {count}; give one name, or {count} names",
        )
    return tuple(names * count if len(names) == 1 else names)


def parse_steps(steps: str | int | Sequence[int], count: int, unit: str = "levels") -> tuple[int, ...]:
    """`count` numbers of diffusion steps from one number (100), a range (40:100, linear and rounded), or one number per
    step of the loop in a list or with commas between; FarError for anything else."""
    text = comma_separated(steps)
    try:
        if ":" in text:
            first, last = (int(part) for part in text.split(":"))
            numbers = [round(first + (last - first) * i / max(count - 1, 1)) for i in range(count)]
        else:
            numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise FarError(
            SettingName("steps"),
            f" {text}: expected a number (100), a range (40:100) or one number per level (40,50,...)",
        ) from None
    if len(numbers) == 1:
        numbers *= count
    if len(numbers) != count:
        raise FarError(
            SettingName("steps"), f" names {len(numbers)} {unit}, the schedule has {count}; give one number, a range, ",
            f"or {count} numbers",
        )  # fmt: skip
    for number in numbers:
        if not 1 <= number <= 1000:
            raise FarError(SettingName("steps"), f" {text}: {number} diffusion steps; expected 1 to 1000")
    return tuple(numbers)


def parse_levels(levels: str | Sequence[int]) -> list[int]:
    """Levels from a list or from a text such as "0,2,3,4"; FarError unless they are whole numbers."""
    text = comma_separated(levels)
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise FarError(
            SettingName("levels"), f" {text}: expected whole numbers with commas between, as in 0,2,3,4"
        ) from None


def comma_separated(values: Any) -> str:
    """The values of a setting as the command line takes them."""
    return str(values) if isinstance(values, (str, int, float)) else ",".join(map(str, values))


def check_levels(levels: Sequence[int], grid: int, masked: bool) -> None:
    """FarError unless the levels rise and lie in 0 to grid - 1.

    A masked model's list may begin like the official one, with 0, 12, 12 and then lower levels.
    """
    name, text = SettingName("levels"), comma_separated(levels)
    if not levels:
        raise FarError("no levels; use ", name, " 0,2,3,4,5,6,7,8,9,10, say")
    for level in levels:
        if not 0 <= level < grid:
            raise FarError(
                name, f" {text}: level {level} is outside 0 to {grid - 1}, the levels of a {grid} x {grid} grid of ",
                "latents",
            )  # fmt: skip
    opens_masked = masked and len(levels) > 3 and levels[0] < levels[1] == levels[2]
    rising = levels[3:] if opens_masked else levels
    if any(a >= b for a, b in pairwise(rising)):
        raise FarError(
            name, f" {text}: levels must rise from low to high frequency, each larger than the one before; use ",
            name, f" {comma_separated(sorted(set(levels)))}, say",
        )  # fmt: skip
