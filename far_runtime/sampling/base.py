"""What all sampling loops have in common: the plan of steps, the condition to draw under, and what an edit keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from far_runtime.engines.base import Array, Engine
from far_runtime.model_info import ModelInfo
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
class TokenChoice:
    """How a step draws tokens from their logits."""

    top_k: int
    """Number of the likeliest tokens to choose from; 0 for all."""
    top_p: float
    """Probability that the likeliest tokens to choose from have to make up; 0 for all tokens."""
    more_smooth: bool
    """Whether the embeddings are mixed from several tokens."""


@dataclass(frozen=True)
class Step:
    """One step of a sampling loop: a level of FAR, an iteration of MAR, a scale of VAR."""

    index: int
    """Its place in the plan, from 0."""
    kind: str
    """What its system calls a step: "level", "iteration" or "scale"."""
    number: int
    """Which level, iteration or scale it is; for a scale, its side in tokens."""
    substeps: int
    """Units of progress in it: diffusion steps, or 1 for a step without any."""
    guidance: float
    """Scale of classifier-free guidance; with 1 the unconditional half is not computed."""
    constants: Mapping[str, int]
    """Integers that a graph takes as inputs [1] or has folded in."""
    calls: tuple[Call, ...]
    """The stages that it runs."""
    visible: int | None = None
    """Tokens of a picture that the encoder sees, where it may see fewer than all."""
    tokens: int | None = None
    """Tokens of a picture that it draws, where these are fewer than all."""
    diffusion: Diffusion | None = None
    """How it draws from the diffusion head, where the system has one."""
    choice: TokenChoice | None = None
    """How it chooses tokens, where the system draws from a vocabulary."""
    scales: tuple[float, ...] = ()
    """The scale of guidance of every picture of a batch, where they differ; `guidance` is then that of a guided one."""
    shared: bool = False
    """Whether all tokens of a picture draw with the same noise."""

    @property
    def name(self) -> str:
        """As it is called in messages: "level 3"."""
        return f"{self.kind} {self.number}"

    @property
    def temperature(self) -> float | None:
        """Factor of the diffusion head's noise; None without a diffusion head."""
        return None if self.diffusion is None else self.diffusion.temperature

    @property
    def details(self) -> dict[str, float]:
        """What tables show of it beside its number, by name."""
        details = {"temperature": self.temperature, "visible": self.visible, "tokens": self.tokens}
        return {name: value for name, value in details.items() if value is not None}

    def guidance_scales(self, batch: int) -> NDArray[np.float32]:
        """The scale of guidance of every picture [B]."""
        return np.array(self.scales or [self.guidance] * batch, np.float32)


Plan = tuple[Step, ...]
"""The steps of a sampling loop for one batch. It is derived once per generation and passed on."""

OnStep = Callable[[Step, int, Array], None]
"""Called after every unit of a step with the step, the number of units done in it, and the state so far."""


@dataclass(frozen=True)
class Condition:
    """Labels or text features of a batch, as inputs of the transformer stage by name, on the engine's device."""

    batch: int
    """Pictures in the batch."""
    cond: Mapping[str, Array]
    """The conditional inputs, one row per picture."""
    cond_uncond: Mapping[str, Array]
    """The conditional rows, then the same pictures' unconditional ones: what a guided step takes."""
    first_output: NDArray[np.float32] | None = None
    """The transformer's output [B or 2 B, L, w] at the first step, on the host, where it was computed before."""

    def rows(self, guidance: float) -> Mapping[str, Array]:
        """The inputs of a step with that guidance."""
        return self.cond if guidance == 1 else self.cond_uncond


def merge_guidance(plans: Sequence[Plan]) -> Plan:
    """The plan of a batch from those of its pictures, which differ in guidance at most: a step is guided where that of
    any picture is."""
    if all(plan is plans[0] for plan in plans):
        return plans[0]
    return tuple(_merged(steps) for steps in zip(*plans, strict=True))


def _merged(steps: Sequence[Step]) -> Step:
    """One step for a batch of pictures, of which each has its own."""
    scales = tuple(step.guidance for step in steps)
    most = max(steps, key=lambda step: sum(call.rows for call in step.calls))
    return replace(most, scales=scales if len(set(scales)) > 1 else ())


def label_condition(engine: Engine, labels: Sequence[int], null: int) -> Condition:
    """Class labels [B] as a condition; `null` is the label of no class."""
    own = np.asarray(labels, np.int64)
    both = np.concatenate([own, np.full_like(own, null)])
    return Condition(len(own), {"labels": engine.put(own)}, {"labels": engine.put(both)})


@dataclass(frozen=True)
class KeptRegion:
    """What an edit keeps of a given picture. latents: what the bundle's encode stage made of it, on the device; keep
    [B, h, w]: True where the latents' cell is kept."""

    latents: Array
    keep: NDArray[np.bool_]


Info = TypeVar("Info", bound=ModelInfo, contravariant=True)


class Sampler(Protocol[Info]):
    """A system's sampling loop: the module far_runtime/sampling/<system>.py.

    `model` is the manifest's. The table far_runtime.sampling.options.SETTINGS says which settings the system takes. A
    system whose first step sees nothing but the condition has a function `first` too (`FirstStep`).
    """

    PRESETS: Mapping[str, Mapping[str, Any]]
    """The settings of the presets quality, balanced and fast where a bundle was not tuned; empty: it has none."""

    def resolve_settings(self, model: Info, given: Mapping[str, Any]) -> dict[str, Any]:
        """All settings by name as JSON values: the given ones, and the official code's for the others. Raises FarError
        for values that cannot be."""

    def plan(self, model: Info, settings: Mapping[str, Any], kept: int = 0) -> Plan:
        """The steps of the loop under resolved settings, for pictures of which an edit keeps so many cells."""

    def sample(
        self,
        engine: Engine,
        model: Info,
        plan: Plan,
        condition: Condition,
        noise: NoiseSource,
        on_step: OnStep | None = None,
        kept: KeptRegion | None = None,
    ) -> Array:
        """Draw a batch: the state that the decode stage takes as its `latents`, on the engine's device."""

    def preview_latents(
        self, model: Info, plan: Plan, samples: Sequence[NDArray[np.float32]]
    ) -> list[NDArray[np.float32]]:
        """What to decode to show the way to the picture: one array for the state after each step."""


FirstStep = Callable[[Engine, Info, Step, Condition], Array]
"""A sampler's function `first`: engine, model, first step of the plan and condition -> the transformer's output
[B, L, w] for the rows `cond` at all L positions, where no latents are known. `sample` takes such rows from
`Condition.first_output` in place of the call."""
