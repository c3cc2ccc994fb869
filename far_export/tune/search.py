"""The search for the cheapest schedule within a limit: a coarse grid, then greedy removal of what is not needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Settings = dict[str, Any]

SOLVERS = ("ddim", "dpmpp-2m", "dpmpp-2m-sde")
COARSE = (12, 8, 5, 3, 2)
STARTS = (900, 950, 975)
"""Tried for models that predict epsilon."""


@dataclass(frozen=True)
class Judged:
    """A candidate that was drawn. flops: of a picture. image, latents: its distances to the reference set of other
    seeds, in units of the reference's own; seconds: a picture."""

    settings: Settings
    flops: float
    image: float
    latents: float
    seconds: float

    @property
    def ratio(self) -> float:
        """The worse of the two distances."""
        return max(self.image, self.latents)


class OutOfBudget(Exception):
    """No further candidate may be drawn."""


@dataclass(frozen=True)
class Space:
    """What can be varied. levels: the official list, or empty for a system without. count: steps of the loop. guidance
    of each at the official settings. epsilon: whether the model predicts epsilon, so that the start matters."""

    levels: tuple[int, ...]
    count: int
    guidance: tuple[float, ...]
    epsilon: bool


class Search:
    """Draws candidates through `judge` and remembers all of them; `cost` is the arithmetic of one, not yet drawn."""

    def __init__(
        self,
        space: Space,
        judge: Callable[[Settings], Judged],
        cost: Callable[[Settings], float],
        base: Settings,
        possible: Callable[[Settings], bool] = lambda settings: True,
    ) -> None:
        """base: the settings that are not varied. possible: whether the bundle can draw a candidate, which is passed
        over otherwise: lists of levels have rules, and a bundle may have graphs for some levels only."""
        self.space, self.base = space, base
        self._judge, self._cost, self._possible = judge, cost, possible
        self.judged: dict[str, Judged] = {}

    def run(self, limits: Sequence[float]) -> None:
        """The grid, then a descent for every limit, the strictest first. Raises OutOfBudget where `judge` does; what
        was judged until then is kept."""
        for settings in filter(self._possible, self.grid()):
            self.judge(settings)
        solver = self.best_solver(max(limits))
        for settings in filter(self._possible, self.finer(solver)):
            self.judge(settings)
        for limit in sorted(limits):
            self.descend(limit)

    def judge(self, settings: Settings) -> Judged:
        """Draw a candidate, unless it was drawn before."""
        key = repr(sorted(settings.items()))
        if key not in self.judged:
            self.judged[key] = self._judge(settings)
        return self.judged[key]

    def grid(self) -> Iterator[Settings]:
        """Every solver with the same number of steps throughout."""
        for steps in COARSE:
            for solver in SOLVERS:
                if solver != "dpmpp-2m-sde" or steps >= 5:  # with fewer its noise is not gone at the end
                    yield self._candidate(solver, [steps] * self.space.count)

    def finer(self, solver: str) -> Iterator[Settings]:
        """With one solver: rising and falling steps, fewer levels, other starts."""
        n = self.space.count
        for first, last in ((1, 8), (1, 5), (2, 5), (1, 3), (5, 2)):
            yield self._candidate(solver, [round(first + (last - first) * i / max(n - 1, 1)) for i in range(n)])
        for levels in self._fewer_levels():
            for steps in (5, 3):
                yield self._candidate(solver, [steps] * len(levels), levels)
        if self.space.epsilon:
            for start in STARTS:
                yield {**self._candidate(solver, [5] * n), "start": start}

    def best_solver(self, limit: float) -> str:
        """The solver of the cheapest candidate within the limit, or of the nearest one."""
        best = self.cheapest(limit) or min(self.judged.values(), key=lambda one: one.ratio)
        return str(best.settings["solver"])

    def cheapest(self, limit: float) -> Judged | None:
        """Of those within the limit, the one with the least arithmetic."""
        return next(iter(self.within(limit)), None)

    def within(self, limit: float) -> list[Judged]:
        """Candidates within the limit, the cheapest first."""
        found = [one for one in self.judged.values() if one.ratio <= limit]
        return sorted(found, key=lambda one: (one.flops, one.ratio))

    def descend(self, limit: float) -> Judged | None:
        """From the cheapest within the limit: take away levels, diffusion steps and guided halves, what saves most
        first, as long as it stays within. What was refused once is not tried again later, when less is left."""
        best, refused = self.cheapest(limit), set()
        while best is not None:
            moves = [
                (name, settings)
                for name, settings in self.moves(best.settings)
                if name not in refused and self._possible(settings)
            ]
            moves.sort(key=lambda move: self._cost(move[1]))
            for name, settings in moves:
                found = self.judge(settings)
                if found.ratio <= limit and found.flops < best.flops:
                    best = found
                    break
                refused.add(name)
            else:
                return best
        return None

    def moves(self, settings: Settings) -> Iterator[tuple[str, Settings]]:
        """Cheaper neighbours, each with a name that says what is taken away."""
        levels, steps = list(settings.get("levels", [])), list(settings["steps"])
        if levels:
            for i in range(1, len(levels)):
                fewer = {"levels": levels[:i] + levels[i + 1 :], "steps": steps[:i] + steps[i + 1 :]}
                yield f"level {levels[i]}", {**settings, **fewer}
            for i, level in enumerate(levels):
                for less in dict.fromkeys((steps[i] // 2, steps[i] - 1)):
                    if less >= 1:
                        changed = {**settings, "steps": [*steps[:i], less, *steps[i + 1 :]]}
                        yield f"level {level} in {less}", changed
        else:
            for less in dict.fromkeys(math.floor(factor * max(steps)) for factor in (0.5, 0.7, 0.85)):
                if less >= 1:
                    yield f"at most {less}", {**settings, "steps": [min(step, less) for step in steps]}
        floors = sorted({scale for scale in self.space.guidance if scale > settings["guidance_floor"]})
        if floors and floors[0] < max(self.space.guidance):
            yield f"floor {floors[0]:g}", {**settings, "guidance_floor": floors[0]}

    def _candidate(self, solver: str, steps: list[int], levels: Sequence[int] | None = None) -> Settings:
        chosen = list(self.space.levels if levels is None else levels)
        return {**self.base, **({"levels": chosen} if chosen else {}), "solver": solver, "steps": steps}

    def _fewer_levels(self) -> Iterator[tuple[int, ...]]:
        """The coarse half, every other, and the coarsest three of the official list."""
        levels = self.space.levels
        if len(levels) >= 4:
            found = (levels[: len(levels) // 2 + 1], levels[: len(levels) // 2], levels[::2], levels[:3])
            yield from dict.fromkeys(found)


def front(judged: Mapping[str, Judged]) -> list[Judged]:
    """Those that no other beats in both arithmetic and ratio, the cheapest first."""
    found: list[Judged] = []
    for one in sorted(judged.values(), key=lambda one: (one.flops, one.ratio)):
        if not found or one.ratio < found[-1].ratio:
            found.append(one)
    return found
