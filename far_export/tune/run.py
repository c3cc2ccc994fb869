"""Tuning a bundle: a search within a budget, and for every limit the preset that it comes to."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from far_export.tune.journal import Journal
from far_export.tune.search import Judged, OutOfBudget, Search, Settings, Space, front
from far_runtime.bundle import Manifest
from far_runtime.errors import FarError
from far_runtime.model_info import DiffusionInfo
from far_runtime.sampling.presets import LIMITS, preset_names
from far_runtime.sampling.schedule import compact
from far_runtime.sampling.settings import resolve_plan, resolve_settings

CONFIRMED = 8
"""Candidates within a limit that get a second look with other seeds: those that none beats, the cheapest first."""

Report = Callable[[str], None]


class Judging(Protocol):
    """What judges a candidate; `distance.Judge`."""

    def __call__(self, settings: Settings) -> Judged:
        """By its distances with the seeds of the reference."""

    def again(self, settings: Settings) -> Judged:
        """By those with other seeds."""

    def cost(self, settings: Settings) -> float:
        """Its arithmetic."""


@dataclass(frozen=True)
class Budget:
    """When the search stops: after so many evaluations (None: no bound), or so many seconds. Those in the journal are
    free; the second looks at what was found, CONFIRMED at most for each preset, come on top."""

    evaluations: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Chosen:
    """A preset that was found. again: its second look, with other seeds."""

    name: str
    judged: Judged
    again: Judged

    @property
    def ratio(self) -> float:
        """The mean of both looks."""
        return (self.judged.ratio + self.again.ratio) / 2


@dataclass(frozen=True)
class Tuned:
    """What a search came to. judged: all candidates. complete: whether it ended by itself, within its budget."""

    judged: dict[str, Judged]
    chosen: dict[str, Chosen]
    complete: bool
    official_flops: float


def space_of(manifest: Manifest) -> tuple[Space, Settings]:
    """What may be varied in a bundle's schedule, and its settings that are not; FarError for a system without diffusion
    steps."""
    if set(preset_names(manifest)) == {"official"}:
        raise FarError(f"a {manifest.system} bundle has no diffusion steps to tune; far tune takes FAR and MAR bundles")
    official, plan = resolve_plan(manifest, {"preset": "official"})
    levels = tuple(official.get("levels", ()))
    epsilon = isinstance(manifest.model, DiffusionInfo) and manifest.model.prediction == "epsilon"
    space = Space(levels, len(plan), tuple(step.guidance for step in plan), epsilon)
    return space, {name: value for name, value in official.items() if name not in ("levels", "steps", "solver")}


def tune(
    manifest: Manifest, judge: Judging, journal: Journal, budget: Budget, report: Report = lambda line: None
) -> Tuned:
    """Search and choose. Evaluations that the journal holds are not made again."""
    space, base = space_of(manifest)
    made, started = 0, time.monotonic()

    def look(settings: Settings, which: str, compute: Callable[[Settings], Judged]) -> Judged:
        nonlocal made
        found = journal.find(settings, which)
        if found is None and not which:
            late = budget.seconds is not None and time.monotonic() - started > budget.seconds
            if late or (budget.evaluations is not None and made >= budget.evaluations):
                raise OutOfBudget
            made += 1
        if found is None:
            found = compute(settings)
            journal.keep(found, which)
            report(f"{len(journal)}: {shown(found)}" + (" (other seeds)" if which else ""))
        return found

    def possible(settings: Settings) -> bool:
        try:
            resolve_settings(manifest, settings)
        except FarError:
            return False
        return True

    search = Search(space, lambda settings: look(settings, "", judge), judge.cost, base, possible)
    complete = True
    try:
        search.run(list(LIMITS.values()))
    except OutOfBudget:
        complete = False
    chosen: dict[str, Chosen] = {}
    for name, limit in LIMITS.items():
        found = _confirmed(
            worth_a_second_look(search.judged, limit), name, limit, lambda one: look(one, "again", judge.again)
        )
        if found is not None:
            chosen[name] = found
    official = judge.cost(resolve_settings(manifest, {"preset": "official"}))
    return Tuned(search.judged, chosen, complete, official)


def worth_a_second_look(judged: dict[str, Judged], limit: float) -> list[Judged]:
    """Candidates within a limit that none beats in both arithmetic and ratio, the cheapest first."""
    return [one for one in front(judged) if one.ratio <= limit]


def _confirmed(candidates: list[Judged], name: str, limit: float, again: Callable[[Settings], Judged]) -> Chosen | None:
    """The cheapest whose two looks together are within the limit. The search picks what happened to do well with its
    seeds, so a second look has to agree."""
    for judged in candidates[:CONFIRMED]:
        one = Chosen(name, judged, again(judged.settings))
        if one.ratio <= limit:
            return one
    return None


def shown(judged: Judged) -> str:
    """A candidate in a line."""
    settings = judged.settings
    parts = [str(settings["solver"]), f"steps {short(settings['steps'])}"]
    parts += [f"levels {','.join(map(str, settings['levels']))}"] if "levels" in settings else []
    parts += [f"start {settings['start']}"] if settings.get("start") is not None else []
    parts += [f"floor {settings['guidance_floor']:g}"] if settings["guidance_floor"] > 1 else []
    return f"{', '.join(parts)}: ratio {judged.image:.3f} images, {judged.latents:.3f} latents"


def short(steps: list[int]) -> str:
    """Steps as they are typed."""
    found = compact(steps)
    return str(found) if isinstance(found, int) else ",".join(map(str, found))
