"""What a system gives to the training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from far_training.loop.randomness import SampleRng

Report = Callable[[nn.Module, int, Path], Mapping[str, float]]
"""report(averaged model, step, run folder): writes a sample sheet and returns numbers for the metrics."""


@dataclass(frozen=True)
class Task:
    """What is trained, on which data, and what becomes of it."""

    system: str
    """Name of the system, as in a bundle's manifest."""
    model: nn.Module
    """The network whose weights are trained, averaged and saved."""
    losses: nn.Module
    """A module around `model`; its forward(*batch) returns scalar tensors by name, "loss" among them."""
    fetch: Callable[[SampleRng, float], tuple[Tensor, ...]]
    """fetch(rng, progress): the batch of the samples at the places of `rng`, at a share `progress` of the run."""
    epoch_length: int
    """Training pictures in a pass through the data."""
    args: Mapping[str, Any]
    """Plain values that rebuild the model and tell how it is trained; they must be the same when a run resumes."""
    report: Report
    finish: Callable[[nn.Module, Path, dict[str, Any]], None]
    """finish(averaged model, run folder, summary): writes the trained model."""
    no_decay: Sequence[str] = ()
    """Parts of the names of parameters without weight decay."""
    has_unused: bool = False
    """Whether some parameters get no gradient in some steps."""
    buffers: Sequence[str] = ()
    """Names of buffers of `losses` that change in the forward pass and that a resumed run needs."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """What a checkpoint states about the model beside its tensors (see far_models.checkpoint.save.metadata_of)."""
    discriminator: nn.Module | None = None
    """A part of `losses` that is trained against the model and dropped at the end."""
