"""Sampling schedules: which levels, how many diffusion steps of which solver at each, how much guidance and which
temperature."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from far_runtime.errors import FarError
from far_runtime.sampling.noise_schedule import TRAIN_STEPS
from far_runtime.sampling.solvers import SOLVERS, Diffusion

OFFICIAL_GRID = 16
OFFICIAL_LEVELS = (0, 2, 3, 4, 5, 6, 7, 8, 9, 10)
OFFICIAL_MASKED_LEVELS = (0, 12, 12, 4, 5, 6, 7, 8, 9, 10, 11)
OFFICIAL_STEPS = 100
OFFICIAL_SOLVER = "ddpm"

DIFFUSION_SETTINGS = ("steps", "solver", "start", "guidance", "guidance_floor", "temperature")
"""Settings of every loop with a diffusion head."""


@dataclass(frozen=True)
class Schedule:
    """One entry per step of the coarse-to-fine loop, in the order in which the steps are made.

    levels: frequency level of the step's input (0: nothing yet). diffusion: how the head is sampled. guidance: scale
    of classifier-free guidance (1: none).
    """

    levels: tuple[int, ...]
    diffusion: tuple[Diffusion, ...]
    guidance: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.levels)


def official_levels(grid: int, masked: bool) -> tuple[int, ...]:
    """The released code's level list for a 16 x 16 grid; for another grid all its levels, 0 to grid - 1."""
    if grid != OFFICIAL_GRID:
        return tuple(range(grid))
    return OFFICIAL_MASKED_LEVELS if masked else OFFICIAL_LEVELS


def make_schedule(
    levels: Sequence[int],
    *,
    grid: int | None = None,
    masked: bool = False,
    guidance: float = 3.0,
    temperature: float = 1.0,
    steps: str | int | Sequence[int] = OFFICIAL_STEPS,
    solver: str | Sequence[str] = OFFICIAL_SOLVER,
    start: int | None = None,
    guidance_floor: float = 1.0,
) -> Schedule:
    """The schedule of `sample_tokens_nomask` or `sample_tokens_mask` (official models/far.py) for any level list.

    Guidance rises linearly, 1 + (guidance - 1) i / n at step i of n. Temperature: 0.8 + (T - 0.8)(1 - cos(pi/2 (i +
    1)/n)), masked 0.85 + (T - 0.85) i / n. `steps`: a number, one per level, or "40:100", linear from the first level
    to the last (FAR's frequency-aware schedule). solver: one of SOLVERS, or one per level. start: timestep of the first
    diffusion step. guidance_floor: levels whose scale is not above it run without guidance. Raises FarError for
    guidance below 0, steps outside 1 to 1000, a solver that is unknown and, where the `grid` of the latents is given,
    levels that do not rise or lie outside it.
    """
    levels = tuple(levels)
    if grid is not None:
        check_levels(levels, grid, masked)
    check_guidance(guidance)
    check_temperature(temperature)
    n = len(levels)
    if masked:
        temperatures = [0.85 + (temperature - 0.85) * i / n for i in range(n)]
    else:
        temperatures = [0.8 + (temperature - 0.8) * (1 - math.cos(math.pi / 2 * (i + 1) / n)) for i in range(n)]
    return Schedule(
        levels=levels,
        diffusion=make_diffusion(steps, solver, start, temperatures),
        guidance=tuple(floored(1 + (guidance - 1) * i / n, guidance_floor) for i in range(n)),
    )


def make_diffusion(
    steps: str | int | Sequence[int],
    solver: str | Sequence[str],
    start: int | None,
    temperatures: Sequence[float],
    of: str = "levels",
) -> tuple[Diffusion, ...]:
    """How each step of the loop samples the head; FarError for what cannot be."""
    count = len(temperatures)
    check_start(start)
    numbers, names = parse_steps(steps, count, of), parse_solvers(solver, count, of)
    if start is not None and max(numbers) > start + 1:
        raise FarError(f"--start {start}: leaves {start + 1} timesteps for {max(numbers)} steps; use fewer --steps")
    return tuple(
        Diffusion(number, name, start, temperature)
        for number, name, temperature in zip(numbers, names, temperatures, strict=True)
    )


def floored(guidance: float, floor: float) -> float:
    """A scale of guidance, or 1 where it is not above the floor: such a step runs without its unconditional half."""
    return 1.0 if 1.0 <= guidance <= floor else guidance


def check_start(start: int | None) -> None:
    """FarError for a start outside the training timesteps."""
    if start is not None and not 1 <= start < TRAIN_STEPS:
        raise FarError(f"--start {start}: expected 1 to {TRAIN_STEPS - 1}, the timestep of the first diffusion step")


def parse_solvers(solver: str | Sequence[str], count: int, of: str = "levels") -> tuple[str, ...]:
    """Solvers per level (or whatever the `count` steps of the loop are) from "ddim" or one name per level; FarError
    otherwise."""
    names = [name.strip() for name in solver.split(",")] if isinstance(solver, str) else list(solver)
    for name in names:
        if name not in SOLVERS:
            raise FarError(f"--solver {name}: unknown; known: {', '.join(SOLVERS)}")
    if len(names) not in (1, count):
        raise FarError(f"--solver names {len(names)} {of}, the schedule has {count}; give one name, or {count} names")
    return tuple(names * count if len(names) == 1 else names)


def check_guidance(guidance: float, option: str = "guidance") -> None:
    """FarError for a scale below 0 or not finite."""
    if guidance < 0 or not math.isfinite(guidance):
        use = "--guidance 3" if option == "guidance" else f"{option} 1"
        raise FarError(f"{option} {guidance:g}: expected 0 or more (1 is no guidance); use {use}, say")


def check_temperature(temperature: float) -> None:
    """FarError for a temperature below 0 or not finite."""
    if temperature < 0 or not math.isfinite(temperature):
        raise FarError(f"temperature {temperature:g}: expected 0 or more; use --temperature 1, say")


def check_levels(levels: tuple[int, ...], grid: int, masked: bool) -> None:
    """FarError unless the levels lie in 0 .. grid - 1 and rise; a masked list may open like the official one, 0,
    12, 12."""
    if not levels:
        raise FarError("no levels; use --levels 0,2,3,4,5,6,7,8,9,10, say")
    shown = ",".join(map(str, levels))
    for level in levels:
        if not 0 <= level < grid:
            raise FarError(
                f"--levels {shown}: level {level} is outside 0 to {grid - 1}, the levels of a {grid} x {grid} "
                f"grid of latents"
            )
    opens_masked = masked and len(levels) > 3 and levels[0] < levels[1] == levels[2]
    rising = levels[3:] if opens_masked else levels
    if any(a >= b for a, b in pairwise(rising)):
        raise FarError(
            f"--levels {shown}: levels must rise from low to high frequency, each larger than the one before; use "
            f"--levels {','.join(map(str, sorted(set(levels))))}, say"
        )


T = TypeVar("T")


def compact(values: Sequence[T]) -> T | list[T]:
    """Values per level as they are recorded: one where all are the same, so that it fits any number of levels."""
    return values[0] if len(set(values)) == 1 else list(values)


def resolve_diffusion_settings(
    given: Mapping[str, Any], count: int, guidance: float, temperature: float, of: str = "levels"
) -> dict[str, Any]:
    """The settings DIFFUSION_OPTIONS of a loop of `count` steps as JSON values: the given ones, and the official code's
    for the others, of which guidance and temperature are the system's. Raises FarError for values that cannot be."""
    start = given.get("start")
    settings = {
        "steps": given.get("steps", OFFICIAL_STEPS),
        "solver": given.get("solver", OFFICIAL_SOLVER),
        "start": None if start is None else int(start),
        "guidance": float(given.get("guidance", guidance)),
        "guidance_floor": float(given.get("guidance_floor", 1.0)),
        "temperature": float(given.get("temperature", temperature)),
    }
    check_guidance(settings["guidance"])
    check_guidance(settings["guidance_floor"], "--guidance-floor")
    check_temperature(settings["temperature"])
    found = make_diffusion(settings["steps"], settings["solver"], settings["start"], [1.0] * count, of)
    steps, solver = compact([one.steps for one in found]), compact([one.solver for one in found])
    return {**settings, "steps": steps, "solver": solver}


def parse_levels(text: str) -> tuple[int, ...]:
    """Levels from "0,2,3,4"; FarError for anything else."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise FarError(f"levels {text!r}: expected whole numbers with commas between, as in 0,2,3,4") from None


def parse_steps(steps: str | int | Sequence[int], count: int, of: str = "levels") -> tuple[int, ...]:
    """Diffusion steps per level (or whatever the `count` steps of the loop are) from 100, "100", "40:100" (linear,
    rounded) or one number per level; FarError otherwise."""
    try:
        if isinstance(steps, str) and ":" in steps:
            first, last = (int(part) for part in steps.split(":"))
            values = [round(first + (last - first) * i / max(count - 1, 1)) for i in range(count)]
        elif isinstance(steps, str) and "," in steps:
            values = [int(part) for part in steps.split(",")]
        elif isinstance(steps, (str, int)):
            values = [int(steps)] * count
        else:
            values = [int(part) for part in steps]
    except ValueError:
        raise FarError(
            f"--steps {steps}: expected a number (100), a range (40:100) or one number per level (40,50,...)"
        ) from None
    if len(values) != count:
        raise FarError(
            f"--steps names {len(values)} {of}, the schedule has {count}; give one number, a range, or {count} numbers"
        )
    for value in values:
        if not 1 <= value <= 1000:
            raise FarError(f"--steps {steps}: {value} diffusion steps; expected 1 to 1000")
    return tuple(values)
