"""The search for the cheapest schedule within a limit: a coarse grid, then greedy removal of what is not needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Settings = dict[str, Any]
"""Resolved sampling settings, by name."""

SOLVERS = ("ddim", "dpmpp-2m", "dpmpp-2m-sde")
GRID_STEPS = (12, 8, 5, 3, 2)
"""Diffusion steps of every level on the grid."""

STARTS = (900, 950, 975)
"""First timesteps that are tried for models that predict epsilon."""


@dataclass(frozen=True)
class Candidate:
    """A schedule that pictures were drawn with, and its distances to the reference set."""

    settings: Settings
    """All settings that the pictures were drawn with."""

    flops: float
    """FLOPs of a picture."""

    image: float
    """Distance of the image features, over the distance of two reference sets."""

    latents: float
    """Distance of the latents' frequencies, over the distance of two reference sets."""

    seconds: float
    """Seconds a picture took."""

    @property
    def ratio(self) -> float:
        """The worse of the two distances."""
        return max(self.image, self.latents)


class OutOfBudget(Exception):
    """No further candidate may be scored."""


@dataclass(frozen=True)
class Space:
    """What can be varied."""

    levels: tuple[int, ...]
    """The official levels; empty for a system without levels."""

    count: int
    """Steps of the loop."""

    guidance: tuple[float, ...]
    """Guidance scale of every step at the official settings."""

    epsilon: bool
    """Whether the model predicts epsilon, so that the first timestep matters."""


class Search:
    """Scores candidates and remembers all of them."""

    def __init__(
        self,
        space: Space,
        score: Callable[[Settings], Candidate],
        cost: Callable[[Settings], float],
        base: Settings,
        possible: Callable[[Settings], bool] = lambda settings: True,
    ) -> None:
        """
        score: draws pictures with the settings and measures their distances; may raise OutOfBudget.
        cost: FLOPs of a picture, without drawing one.
        base: the settings that are not varied.
        possible: whether the bundle can draw with the settings. Lists of levels have rules, and a bundle may have
        graphs for some levels only.
        """
        self.space, self.base = space, base
        self._score, self._cost, self._possible = score, cost, possible
        self.candidates: dict[str, Candidate] = {}

    def run(self, limits: Sequence[float]) -> None:
        """The grid, then a descent for every limit, the strictest first. Raises OutOfBudget where `score` does; the
        candidates so far are kept."""
        for settings in filter(self._possible, self.grid()):
            self.score(settings)
        solver = self.best_solver(max(limits))
        for settings in filter(self._possible, self.finer(solver)):
            self.score(settings)
        for limit in sorted(limits):
            self.descend(limit)

    def score(self, settings: Settings) -> Candidate:
        """Score a candidate, unless it was scored before."""
        key = repr(sorted(settings.items()))
        if key not in self.candidates:
            self.candidates[key] = self._score(settings)
        return self.candidates[key]

    def grid(self) -> Iterator[Settings]:
        """Every solver with the same number of steps throughout."""
        for steps in GRID_STEPS:
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
        best = self.cheapest(limit) or min(self.candidates.values(), key=lambda candidate: candidate.ratio)
        return str(best.settings["solver"])

    def cheapest(self, limit: float) -> Candidate | None:
        """The candidate within the limit that takes the fewest FLOPs."""
        within = [candidate for candidate in self.candidates.values() if candidate.ratio <= limit]
        return min(within, key=_by_cost, default=None)

    def descend(self, limit: float) -> Candidate | None:
        """From the cheapest within the limit: take away levels, diffusion steps and guidance, what saves most first, as
        long as the ratio stays within. A move that was refused once is not tried again later, when less is left."""
        best, refused = self.cheapest(limit), set()
        while best is not None:
            moves = [
                (name, settings)
                for name, settings in self.moves(best.settings)
                if name not in refused and self._possible(settings)
            ]
            moves.sort(key=lambda move: self._cost(move[1]))
            for name, settings in moves:
                candidate = self.score(settings)
                if candidate.ratio <= limit and candidate.flops < best.flops:
                    best = candidate
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
        """The coarser half of the official levels, every other one, and the coarsest three."""
        levels = self.space.levels
        if len(levels) >= 4:
            half = len(levels) // 2
            yield from dict.fromkeys((levels[: half + 1], levels[:half], levels[::2], levels[:3]))


def front(candidates: Mapping[str, Candidate]) -> list[Candidate]:
    """The Pareto front, the cheapest first: candidates that no other beats in both FLOPs and ratio."""
    edge: list[Candidate] = []
    for candidate in sorted(candidates.values(), key=_by_cost):
        if not edge or candidate.ratio < edge[-1].ratio:
            edge.append(candidate)
    return edge


def _by_cost(candidate: Candidate) -> tuple[float, float]:
    return candidate.flops, candidate.ratio
