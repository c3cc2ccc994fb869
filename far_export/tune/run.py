"""Tuning a bundle: a search within a budget, and for every limit the preset that it comes to."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from far_export.tune.journal import Journal
from far_export.tune.search import Candidate, OutOfBudget, Search, Settings, Space, front
from far_runtime.bundle import Manifest
from far_runtime.errors import FarError
from far_runtime.model_info import DiffusionInfo
from far_runtime.sampling.presets import LIMITS, preset_names
from far_runtime.sampling.schedule import compact
from far_runtime.sampling.settings import resolve_plan, resolve_settings

MAX_CONFIRMATIONS = 8
"""The most candidates within a limit that are scored again with other seeds, the cheapest first."""

CONFIRMATION = "again"
"""The name of a second score in the journal."""


class CandidateScorer(Protocol):
    """Scores candidates; `distance.Scorer` does."""

    def __call__(self, settings: Settings) -> Candidate:
        """Score a candidate by its distances to the reference set."""

    def confirm(self, settings: Settings) -> Candidate:
        """Score it once more, with other seeds."""

    def cost(self, settings: Settings) -> float:
        """FLOPs of a picture."""


@dataclass(frozen=True)
class Budget:
    """When the search stops; candidates in the journal are free, and confirmations come on top."""

    evaluations: int | None = None
    """The most candidates that are scored, None for any number."""

    seconds: float | None = None
    """The most seconds that the search takes, None for any number."""


@dataclass(frozen=True)
class ChosenPreset:
    """The cheapest candidate whose two scores are within a preset's limit."""

    name: str
    """The preset's name."""

    candidate: Candidate
    """The settings, scored with the first seeds."""

    confirmation: Candidate
    """The same settings scored with other seeds."""

    @property
    def ratio(self) -> float:
        """The mean of both ratios."""
        return (self.candidate.ratio + self.confirmation.ratio) / 2


@dataclass(frozen=True)
class TuneResult:
    """What a search came to."""

    candidates: dict[str, Candidate]
    """All candidates that were scored."""

    chosen: dict[str, ChosenPreset]
    """Presets by name, without those for whose limit there is no candidate."""

    complete: bool
    """Whether the search ended within its budget."""

    official_flops: float
    """FLOPs of a picture by the official schedule."""


def space_of(manifest: Manifest) -> tuple[Space, Settings]:
    """What can be varied in a bundle's schedule, and the settings that stay; FarError for a system without diffusion
    steps."""
    if set(preset_names(manifest)) == {"official"}:
        raise FarError(f"a {manifest.system} bundle has no diffusion steps to tune; far tune takes FAR and MAR bundles")
    official, plan = resolve_plan(manifest, {"preset": "official"})
    space = Space(
        levels=tuple(official.get("levels", ())),
        count=len(plan),
        guidance=tuple(step.guidance for step in plan),
        epsilon=isinstance(manifest.model, DiffusionInfo) and manifest.model.prediction == "epsilon",
    )
    return space, {name: value for name, value in official.items() if name not in ("levels", "steps", "solver")}


class Scores:
    """Scores of candidates: from the journal, or computed within the budget and written to it."""

    def __init__(
        self, scorer: CandidateScorer, journal: Journal, budget: Budget, report: Callable[[str], None]
    ) -> None:
        self._scorer, self._journal, self._budget, self._report = scorer, journal, budget, report
        self._computed, self._started = 0, time.monotonic()

    def score(self, settings: Settings) -> Candidate:
        """The score of a candidate; OutOfBudget where it would have to be computed and the budget is spent."""
        candidate = self._journal.find(settings)
        if candidate is None:
            late = self._budget.seconds is not None and time.monotonic() - self._started > self._budget.seconds
            if late or (self._budget.evaluations is not None and self._computed >= self._budget.evaluations):
                raise OutOfBudget
            self._computed += 1
            candidate = self._keep(self._scorer(settings))
        return candidate

    def confirm(self, settings: Settings) -> Candidate:
        """The score of a candidate with other seeds, whatever is left of the budget."""
        candidate = self._journal.find(settings, CONFIRMATION)
        return self._keep(self._scorer.confirm(settings), CONFIRMATION) if candidate is None else candidate

    def _keep(self, candidate: Candidate, which: str = "") -> Candidate:
        self._journal.keep(candidate, which)
        self._report(f"{len(self._journal)}: {line_of(candidate)}" + (" (other seeds)" if which else ""))
        return candidate


def tune(
    manifest: Manifest,
    scorer: CandidateScorer,
    journal: Journal,
    budget: Budget,
    report: Callable[[str], None] = lambda line: None,
) -> TuneResult:
    """Search a bundle's schedules, and choose a preset for every limit; what the journal holds is not scored again."""
    space, base = space_of(manifest)
    scores = Scores(scorer, journal, budget, report)

    def possible(settings: Settings) -> bool:
        try:
            resolve_settings(manifest, settings)
        except FarError:
            return False
        return True

    search = Search(space, scores.score, scorer.cost, base, possible)
    complete = True
    try:
        search.run(list(LIMITS.values()))
    except OutOfBudget:
        complete = False
    chosen = {}
    for name, limit in LIMITS.items():
        within = [candidate for candidate in front(search.candidates) if candidate.ratio <= limit]
        preset = _confirmed(within, name, limit, scores.confirm)
        if preset is not None:
            chosen[name] = preset
    official_flops = scorer.cost(resolve_settings(manifest, {"preset": "official"}))
    return TuneResult(search.candidates, chosen, complete, official_flops)


def _confirmed(
    candidates: list[Candidate], name: str, limit: float, confirm: Callable[[Settings], Candidate]
) -> ChosenPreset | None:
    """The first candidate whose mean ratio of both scores is within the limit.

    The search picks what happens to do well with its seeds, so a score with other seeds has to agree.
    """
    for candidate in candidates[:MAX_CONFIRMATIONS]:
        preset = ChosenPreset(name, candidate, confirm(candidate.settings))
        if preset.ratio <= limit:
            return preset
    return None


def line_of(candidate: Candidate) -> str:
    """A candidate in a line of text."""
    settings = candidate.settings
    parts = [str(settings["solver"]), f"steps {steps_text(settings['steps'])}"]
    parts += [f"levels {','.join(map(str, settings['levels']))}"] if "levels" in settings else []
    parts += [f"start {settings['start']}"] if settings.get("start") is not None else []
    parts += [f"floor {settings['guidance_floor']:g}"] if settings["guidance_floor"] > 1 else []
    return f"{', '.join(parts)}: ratio {candidate.image:.3f} images, {candidate.latents:.3f} latents"


def steps_text(steps: list[int]) -> str:
    """Steps as --steps takes them."""
    short = compact(steps)
    return str(short) if isinstance(short, int) else ",".join(map(str, short))
