"""What a run says before it starts and at its end; official recipes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from far_models.training.chance import Chance
from far_models.training.cli import train
from far_models.training.loop import LoopSettings
from far_models.training.plan import measured_cost
from far_runtime.errors import FarError

Run = Callable[..., Result]


class Product(nn.Module):
    """A loss of one matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 4))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (x @ self.weight).square().sum()}


def test_cost_counts_forward_and_backward_and_what_is_kept() -> None:
    cost = measured_cost(Product(), (torch.ones(16, 8),), half=False)
    assert cost.flop == 2 * (2 * 16 * 8 * 4)  # the product and the gradient of its weight
    assert cost.activations == 4 * (16 * 8 + 16 * 4)  # what is multiplied, and what is squared


def test_a_run_tells_its_plan_and_ends_with_its_sheet(
    latents: Path, vae_run: Path, run_train: Run, tmp_path: Path
) -> None:
    data = ("--data", latents, "--vae", vae_run / "vae.safetensors", "-o", tmp_path / "run")
    lines = run_train("far", *data, "--steps", 25, "--log-steps", 5).output.splitlines()
    kinds = [line.split(":")[0] for line in lines[:7]]
    assert kinds == ["plan", "data", "batch", "a step", "memory of a process", "recipe", "length"]
    assert "10 pictures, 2.5 steps an epoch" in lines[1]
    assert "4 = 1 processes x 1 in turn x 4; cpu, float32" in lines[2]
    assert "25 steps, 10.0 epochs" in lines[6]
    told = next(i for i, line in enumerate(lines) if "hours to go, until about" in line)
    assert lines[told - 1].startswith("step 15 ")
    assert lines[told + 1].startswith("step 20 ")
    assert lines[-1] == f"sheet: {tmp_path / 'run' / 'sheets' / 'samples-000025.png'}"
    assert str(tmp_path / "run" / "checkpoint-last.pth") in lines[-2]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(record["pictures_per_second"] > 0 and record["tflops"] > 0 for record in records if "loss" in record)


def test_presets_are_defaults_and_options_win(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from far_models.training import cli_far

    seen: dict[str, object] = {}

    def far_task(config: object, settings: object, *rest: object) -> None:
        seen.update(config=config, settings=settings)
        raise FarError("far enough")

    monkeypatch.setattr("far_models.training.far.far_task", far_task)
    monkeypatch.setattr(cli_far, "open_latents", lambda *given: (Latents(), None))
    arguments = ["far", "--preset", "far-b", "--data", "x", "--vae", "y", "-o", str(tmp_path), "--epochs", "400"]
    CliRunner().invoke(train, [*arguments, "--draws", "2", "--batch", "2048"])
    config, settings = seen["config"], seen["settings"]
    assert (config.encoder_width, config.head_depth, config.latent_scale) == (768, 6, 0.2325)  # type: ignore[attr-defined]
    assert (settings.draws, settings.label_drop, settings.dropout) == (2, 0.1, 0.1)  # type: ignore[attr-defined]


class Latents:
    """Of ImageNet, as far as the sizes of a model go."""

    grid, channels, scale, names = 16, 16, 1.0, tuple(map(str, range(1000)))


def test_epochs_and_rates_become_steps() -> None:
    settings = LoopSettings(Path("run"), epochs=400, batch=2048, blr=1e-4, warmup_epochs=100).settled(1_281_167)
    assert (settings.steps, settings.lr, settings.warmup) == (250228, pytest.approx(8e-4), 62557)
    assert LoopSettings(Path("run"), epochs=2, steps=3, batch=4).settled(8).steps == 3
    with pytest.raises(FarError, match="--epochs"):
        LoopSettings(Path("run")).settled(8)


def test_a_sample_draws_the_same_wherever_it_is() -> None:
    whole, part = Chance(3, 7, range(8)), Chance(3, 7, [5, 2])
    for draw in (lambda c: c.normal(2, 3), lambda c: c.uniform(), lambda c: c.integers(1000, 4)):
        assert torch.equal(draw(whole)[[5, 2]], draw(part))
    assert whole.of_step.random() == part.of_step.random()
    assert not torch.equal(Chance(3, 8, [5]).normal(4), Chance(3, 7, [5]).normal(4))
    assert not torch.equal(Chance(4, 7, [5]).normal(4), Chance(3, 7, [5]).normal(4))
    numbers = Chance(0, 0, range(500)).normal(20)
    assert abs(numbers.mean()) < 0.04 and abs(numbers.std() - 1) < 0.04
