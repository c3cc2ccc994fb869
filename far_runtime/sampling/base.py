"""What all sampling loops have in common: the plan of steps, the condition to draw under, and what an edit keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from far_runtime.engines.base import Array, Engine
from far_runtime.sampling.noise import NoiseSource
from far_runtime.sampling.solvers import Diffusion


@dataclass(frozen=True)
class Call:
    """Runs of one stage for one picture.

    rows: rows of the stage's batch axis (2 where the step is guided). sizes: the dynamic axes other than the batch, by
    name. constants: what picks the graph of a stage that has several.
    """

    stage: str
    times: int = 1
    rows: int = 1
    constants: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One step of a sampling loop.

    index: its place in the plan. kind, number: what it is called ("level" 3, "iteration" 5, "scale" 13). inner: units
    of progress in it (diffusion steps; 1 for a step without any). guidance: scale of classifier-free guidance; with 1
    the unconditional half is not computed. constants: integers that a graph takes as [1] inputs or has folded in.
    calls: the stages that it runs. shown: what tables show of it beside. diffusion: how it draws from the diffusion
    head, where it does. each: the scales of a batch's pictures where they differ; guidance is then a guided one's.
    shared: whether all tokens draw with the same noise.
    """

    index: int
    kind: str
    number: int
    inner: int
    guidance: float
    constants: Mapping[str, int]
    calls: tuple[Call, ...]
    shown: Mapping[str, int | float] = field(default_factory=dict)
    diffusion: Diffusion | None = None
    each: tuple[float, ...] = ()
    shared: bool = False

    @property
    def name(self) -> str:
        """As it is called in messages: "level 3"."""
        return f"{self.kind} {self.number}"

    def scales(self, batch: int) -> NDArray[np.float32]:
        """The scale of guidance of every picture [B]."""
        return np.array(self.each or [self.guidance] * batch, np.float32)


OnStep = Callable[[Step, int, Array], None]
"""Called after every unit of a step with the step, the number of units done in it, and the state so far."""


@dataclass(frozen=True)
class Condition:
    """What the pictures of a batch show, as the transformer's inputs by name, on the engine's device.

    own: a row a picture. both: those rows, then the same pictures' unconditional ones. first: what the transformer
    makes of the rows that a guided or unguided first step takes, on the host, where that was computed before.
    """

    batch: int
    own: Mapping[str, Array]
    both: Mapping[str, Array]
    first: NDArray[np.float32] | None = None

    def rows(self, guidance: float) -> Mapping[str, Array]:
        """The inputs of a step with that guidance."""
        return self.own if guidance == 1 else self.both


def each_guided(plan: Callable[[Mapping[str, Any]], tuple[Step, ...]], settings: Mapping[str, Any]) -> tuple[Step, ...]:
    """The plan under settings whose guidance may be a tuple, with a scale for each picture of a batch: a step is guided
    where any picture's is."""
    scales = settings["guidance"]
    if not isinstance(scales, tuple):
        return plan(settings)
    plans = {scale: plan({**settings, "guidance": scale}) for scale in scales}
    return tuple(_joined(steps) for steps in zip(*(plans[scale] for scale in scales), strict=True))


def _joined(steps: Sequence[Step]) -> Step:
    """One step for a batch of pictures, of which each has its own."""
    scales = tuple(step.guidance for step in steps)
    most = max(steps, key=lambda step: sum(call.rows for call in step.calls))
    return replace(most, each=scales if len(set(scales)) > 1 else ())


def label_condition(engine: Engine, labels: Sequence[int], null: int) -> Condition:
    """Class labels [B] as a condition; `null` is the label of no class."""
    own = np.asarray(labels, np.int64)
    both = np.concatenate([own, np.full_like(own, null)])
    return Condition(len(own), {"labels": engine.put(own)}, {"labels": engine.put(both)})


@dataclass(frozen=True)
class Known:
    """What an edit keeps of a given picture. latents: what the bundle's encode stage made of it, on the device; keep
    [B, h, w]: True where the latents' cell is kept."""

    latents: Array
    keep: NDArray[np.bool_]


class Sampler(Protocol):
    """A system's sampling loop: the module far_runtime/samplers/<system>.py.

    `model` is the manifest's; `settings` are the sampling settings by name, as `settle` returns them. A system whose
    first step sees nothing but the condition has a `first` too (`FirstStep`).
    """

    OPTIONS: tuple[str, ...]
    """The settings that it takes; guidance is one of every system's."""

    def settle(self, model: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """All settings as JSON values: the given ones, and the official code's for the others. Raises FarError for
        values that cannot be."""

    def plan(self, model: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[Step, ...]:
        """The steps of the loop. A tuple for guidance has a scale for each picture of a batch (`each_guided`)."""

    def sample(
        self,
        engine: Engine,
        model: Mapping[str, Any],
        settings: Mapping[str, Any],
        condition: Condition,
        noise: NoiseSource,
        on_step: OnStep | None = None,
        known: Known | None = None,
    ) -> Array:
        """Draw: the state that the decode stage takes as its `latents`, on the engine's device."""

    def views(
        self, model: Mapping[str, Any], settings: Mapping[str, Any], samples: Sequence[NDArray[np.float32]]
    ) -> list[NDArray[np.float32]]:
        """What to decode to show the way: one array for the state after each step."""


FirstStep = Callable[[Engine, Mapping[str, Any], Step, Condition], Array]
"""What a sampler's `first` does: from engine, model, first step of the plan and a condition, the transformer's output
[B, L, w] for the rows `own` at all L positions, where no latents are known. `sample` takes such rows from
`Condition.first` in place of the call."""
