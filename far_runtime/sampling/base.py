"""What all sampling loops share: the plan of steps, the condition of a batch, and the region that an edit keeps."""

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
    """How often a step runs one stage for one picture, and on arrays of which sizes."""

    stage: str
    """Name of the stage."""
    times: int = 1
    """Number of runs."""
    rows: int = 1
    """Rows of the batch axis for each picture: 2 with guidance, 1 without."""
    constants: Mapping[str, int] = field(default_factory=dict)
    """Integers, by name, that choose the graph where the stage has several."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Sizes of the dynamic axes other than the batch, by name."""


@dataclass(frozen=True)
class TokenChoice:
    """How a step draws tokens from their logits."""

    top_k: int
    """Number of the likeliest tokens to choose from; 0 for all."""
    top_p: float
    """Probability that the likeliest tokens to choose from add up to; 0 for all tokens."""
    more_smooth: bool
    """Whether the embeddings of several tokens are mixed."""


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
    """Number of its diffusion steps; 1 for a step without diffusion. Progress is reported after each."""
    guidance: float
    """Scale of classifier-free guidance; with 1 the unconditional half is not computed."""
    constants: Mapping[str, int]
    """Integers, by name, that a graph takes as inputs [1] or has folded in."""
    calls: tuple[Call, ...]
    """The stages that it runs, in their order."""
    visible: int | None = None
    """Number of a picture's tokens that the encoder sees; None: always all."""
    tokens: int | None = None
    """Number of tokens that it draws for a picture; None: always all."""
    diffusion: Diffusion | None = None
    """How it draws from the diffusion head; None in a system without one."""
    choice: TokenChoice | None = None
    """How it draws tokens from a vocabulary; None in a system without one."""
    scales: tuple[float, ...] = ()
    """The scale of guidance of each picture of a batch, where these differ; `guidance` is then the scale of a guided
    picture."""
    shared: bool = False
    """Whether all tokens of a picture draw with the same noise."""

    @property
    def name(self) -> str:
        """What messages call it: "level 3"."""
        return f"{self.kind} {self.number}"

    @property
    def temperature(self) -> float | None:
        """Factor of the diffusion head's noise; None without a diffusion head."""
        return None if self.diffusion is None else self.diffusion.temperature

    @property
    def details(self) -> dict[str, float]:
        """The numbers that tables show beside its own, by name."""
        details = {"temperature": self.temperature, "visible": self.visible, "tokens": self.tokens}
        return {name: value for name, value in details.items() if value is not None}

    def guidance_scales(self, batch: int) -> NDArray[np.float32]:
        """The scale of guidance of each picture [B]."""
        return np.array(self.scales or [self.guidance] * batch, np.float32)


Plan = tuple[Step, ...]
"""The steps of a sampling loop for one batch. It is made once per generation and passed on."""

OnStep = Callable[[Step, int, Array], None]
"""Called after every diffusion step, or after a step without diffusion: with the step of the loop, the number of its
substeps that are done, and the state so far."""


@dataclass(frozen=True)
class Condition:
    """Labels or text features of a batch, as inputs of the transformer stage by name, on the engine's device."""

    batch: int
    """Pictures in the batch."""
    cond: Mapping[str, Array]
    """The conditional inputs, one row per picture."""
    cond_uncond: Mapping[str, Array]
    """The inputs of a guided step: the conditional rows, then the unconditional rows of the same pictures."""
    first_output: NDArray[np.float32] | None = None
    """The transformer's output [B or 2 B, L, w] at the first step, on the host; None: it is to be computed."""

    def rows(self, guidance: float) -> Mapping[str, Array]:
        """The inputs of a step with that scale of guidance."""
        return self.cond if guidance == 1 else self.cond_uncond


def merge_guidance(plans: Sequence[Plan]) -> Plan:
    """The plan of a batch from the plans of its pictures, which may differ in guidance only. A step is guided where it
    is guided for any picture."""
    if all(plan is plans[0] for plan in plans):
        return plans[0]
    return tuple(_merged(steps) for steps in zip(*plans, strict=True))


def _merged(steps: Sequence[Step]) -> Step:
    """One step of a batch from the same step of each of its pictures."""
    scales = tuple(step.guidance for step in steps)
    guided = max(steps, key=lambda step: sum(call.rows for call in step.calls))
    return replace(guided, scales=scales if len(set(scales)) > 1 else ())


def label_condition(engine: Engine, labels: Sequence[int], null: int) -> Condition:
    """Class labels [B] as a condition; `null` is the label of no class."""
    cond = np.asarray(labels, np.int64)
    cond_uncond = np.concatenate([cond, np.full_like(cond, null)])
    return Condition(len(cond), {"labels": engine.put(cond)}, {"labels": engine.put(cond_uncond)})


@dataclass(frozen=True)
class KeptRegion:
    """The part of a picture that an edit keeps."""

    latents: Array
    """The picture's latents, from the encode stage, once per picture of the batch, on the engine's device."""
    keep: NDArray[np.bool_]
    """[B, h, w], True for cells of the latents that are kept; on the host."""


Info = TypeVar("Info", bound=ModelInfo, contravariant=True)


class Sampler(Protocol[Info]):
    """A system's sampling loop: the module far_runtime/sampling/<system>.py.

    `model` is the manifest's. The table far_runtime.sampling.options.SETTINGS says which settings the system takes. A
    system whose first step sees nothing but the condition has a function `first` too (`FirstStep`).
    """

    PRESETS: Mapping[str, Mapping[str, Any]]
    """Settings of the presets quality, balanced and fast for bundles that were not tuned; empty: it has no presets."""

    def resolve_settings(self, model: Info, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """All settings by name as JSON values: the overrides, and the released code's values for the others.

        FarError for values that are out of range or do not fit each other.
        """

    def plan(self, model: Info, settings: Mapping[str, Any], kept: int = 0) -> Plan:
        """The steps of the loop under resolved settings. `kept`: cells of each picture that an edit keeps."""

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
        """Draw a batch; returns what the decode stage takes as its `latents`, on the engine's device."""

    def preview_latents(
        self, model: Info, plan: Plan, samples: Sequence[NDArray[np.float32]]
    ) -> list[NDArray[np.float32]]:
        """Latents to decode as a preview of each step, from the states after the steps."""


FirstStep = Callable[[Engine, Info, Step, Condition], Array]
"""A sampler's function `first`: from engine, model, first step of the plan and condition, the transformer's output
[B, L, w] for the rows `cond` at all L positions, before any latents are drawn. `sample` takes such rows from
`Condition.first_output` instead of the call."""
