"""What a run says before it starts and at its end; official recipes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from far_models.vq_vae import VQVAEConfig
from far_runtime.errors import FarError
from far_training.cli.main import train
from far_training.cli.recipes import FAR_PRESETS, MAR_PRESETS, T2I_PRESETS, VAR_PRESETS, Recipe
from far_training.loop.cost_estimate import measured_cost
from far_training.loop.display import ProgressDisplay
from far_training.loop.optimization import recompute_blocks
from far_training.loop.randomness import SampleRng
from far_training.loop.settings import LoopSettings
from far_training.loop.task import Task

Run = Callable[..., Result]


class Product(nn.Module):
    """A loss of one matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 4))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (x @ self.weight).square().sum()}


class Stack(nn.Module):
    """A loss of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        for block in self.blocks:
            x = block(x)
        return {"loss": x.square().sum()}


def test_cost_counts_forward_and_backward_and_what_is_kept() -> None:
    cost = measured_cost(Product(), (torch.ones(16, 8),), autocast=False)
    assert cost.flop == 2 * (2 * 16 * 8 * 4)  # the product and the gradient of its weight
    assert cost.activations == 4 * (16 * 8 + 16 * 4)  # what is multiplied, and what is squared


def test_blocks_that_are_computed_again_keep_what_comes_in() -> None:
    stack = Stack()
    all_kept = measured_cost(stack, (torch.ones(16, 8),), autocast=False)
    recompute_blocks(stack)
    again = measured_cost(stack, (torch.ones(16, 8),), autocast=False)
    assert again.activations == 4 * 16 * 8 * 3  # of both blocks, and what is squared
    assert again.activations < all_kept.activations
    assert again.flop > all_kept.flop


def test_a_terminal_gets_one_live_line() -> None:
    screen = Terminal()
    with ProgressDisplay(print, True, screen) as display:
        display.log("model: ...")
        display.log_metrics(20, 1.5, 0.1, {"loss": 0.25, "pictures_per_second": 123.4})
        display.update(21, 0.42)
        assert display._bars is not None
        display._bars.refresh()
    text = screen.getvalue()
    assert "model: ..." in text
    assert "42%" in text
    assert "step 21 epoch 1.5 loss 0.2500 123 pictures/s" in text


class Terminal(io.StringIO):
    """A screen to write to."""

    def isatty(self) -> bool:
        return True


def test_a_run_prints_what_it_costs_and_ends_with_its_sheet(
    latents: Path, vae_run: Path, run_train: Run, tmp_path: Path
) -> None:
    data = ("--data", latents, "--vae", vae_run / "vae.safetensors", "-o", tmp_path / "run")
    lines = run_train("far", *data, "--steps", 25, "--log-steps", 5).output.splitlines()
    kinds = [line.split(":")[0] for line in lines[:8]]
    assert kinds == ["model", "data", "batch", "a step", "memory of a process", "recipe", "loss", "length"]
    assert "10 pictures of 3 classes, 2.5 steps an epoch" in lines[1]
    assert "4 = 1 process x 1 in turn x 4; cpu, float32" in lines[2]
    assert "25 steps, 10.0 epochs" in lines[7]
    estimate = next(i for i, line in enumerate(lines) if "minutes to go, until about" in line)
    assert lines[estimate - 1].startswith("step 15 ")
    assert lines[estimate + 1].startswith("step 20 ")
    assert lines[-1] == f"sheet: {tmp_path / 'run' / 'sheets' / 'samples-000025.png'}"
    assert str(tmp_path / "run" / "checkpoint-last.pth") in lines[-2]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(record["pictures_per_second"] > 0 and record["tflops"] > 0 for record in records if "loss" in record)


Invoke = Callable[..., tuple[Any, Any, LoopSettings]]


@pytest.fixture
def of_preset(monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """A command's model configuration, loss and loop settings with some options, on data of ImageNet's sizes."""
    from far_training.cli import far as cli_far
    from far_training.cli import mar as cli_mar

    def invoke(command: str, *options: object) -> tuple[Any, Any, LoopSettings]:
        seen: list[Any] = []

        def task(*arguments: Any) -> Task:
            seen.extend(arguments[:2])
            return SimpleNamespace(model=None)  # type: ignore[return-value]

        def run_loop(task: Task, settings: LoopSettings, log: object) -> None:
            seen.append(settings.resolved(1_281_167))

        monkeypatch.setattr(f"far_training.systems.{command}.{command}_task", task)
        monkeypatch.setattr("far_training.loop.trainer.train", run_loop)
        arguments = [command, "--data", "x", "--vae", "y", "-o", "run", *map(str, options)]
        CliRunner().invoke(train, arguments, catch_exceptions=False)
        return seen[0], seen[1], seen[2]

    for module in (cli_far, cli_mar):
        monkeypatch.setattr(module, "open_latents", lambda *arguments: (Latents(), None))
    vqvae = SimpleNamespace(config=VQVAEConfig())
    vqvae.to = lambda device: vqvae
    monkeypatch.setattr(
        "far_models.checkpoint.load.load_checkpoint", lambda *arguments, **more: SimpleNamespace(model=vqvae)
    )
    monkeypatch.setattr("far_models.pictures.open_pictures", lambda *arguments: None)
    monkeypatch.setattr("far_training.data.tokens.coded_set", lambda *arguments: Latents())
    return invoke


def test_presets_are_the_official_recipes(of_preset: Invoke) -> None:
    config, loss, loop = of_preset("far", "--preset", "far-b")
    assert (config.encoder_width, config.head_depth, config.latent_scale, config.buffer) == (768, 6, 0.2325, 64)
    assert (loss.draws, loss.label_drop, loss.dropout, loss.per_sample, loss.simplify) == (4, 0.1, 0.1, False, True)
    assert (loop.batch, loop.steps, loop.lr, loop.warmup) == (2048, 250228, pytest.approx(8e-4), 62557)
    assert (loop.weight_decay, loop.beta2, loop.clip, loop.ema, loop.ema_ramped) == (0.02, 0.95, 3.0, 0.9999, False)
    assert of_preset("far", "--preset", "far-h")[0].encoder_depth == 20
    config, loss, loop = of_preset("mar", "--preset", "mar-h")
    assert (config.head_depth, config.head_width, loss.mask_least) == (12, 1536, 0.7)
    config, loss, loop = of_preset("var", "--preset", "var-d30")
    assert (config.width, config.depth, loss.drop_path, loss.gain) == (1920, 30, 0.125, 1e-5)
    assert (loop.batch, loop.lr, loop.weight_decay, loop.weight_decay_end) == (1024, pytest.approx(3.2e-4), 0.05, 0.08)


@pytest.mark.parametrize(
    ("command", "presets"),
    [("far", FAR_PRESETS), ("mar", MAR_PRESETS), ("far-t2i", T2I_PRESETS), ("var", VAR_PRESETS)],
)
def test_presets_set_options_that_are_there(command: str, presets: dict[str, Recipe]) -> None:
    parameters = {parameter.name: parameter for parameter in train.commands[command].params}
    for name, recipe in presets.items():
        defaults = recipe.defaults()
        assert defaults.keys() <= parameters.keys(), name
        for option, value in defaults.items():
            parameter = parameters[option]
            assert parameter.type_cast_value(click.Context(train), value) == value, (name, option)


def test_options_win_over_the_preset(of_preset: Invoke) -> None:
    config, loss, loop = of_preset(
        "far", "--preset", "far-b", "--draws", 2, "--width", 192, "--heads", 4, "--batch", 64, "--steps", 500000,
        "--lr", 3e-4, "--warmup", 7,
    )  # fmt: skip
    assert (config.encoder_width, config.encoder_depth, loss.draws, loss.label_drop) == (192, 12, 2, 0.1)
    assert (loop.batch, loop.steps, loop.lr, loop.warmup) == (64, 500000, 3e-4, 7)
    assert of_preset("far", "--preset", "far-b", "--minutes", 5)[2].steps is None


class Latents:
    """Of ImageNet, as far as the sizes of a model go."""

    grid, channels, scale, names = 16, 16, 1.0, tuple(map(str, range(1000)))


def test_epochs_and_rates_become_steps() -> None:
    settings = LoopSettings(Path("run"), epochs=400, batch=2048, blr=1e-4, warmup_epochs=100).resolved(1_281_167)
    assert (settings.steps, settings.lr, settings.warmup) == (250228, pytest.approx(8e-4), 62557)
    assert LoopSettings(Path("run"), epochs=2, steps=3, batch=4).resolved(8).steps == 3
    with pytest.raises(FarError, match="give steps, epochs or minutes"):
        LoopSettings(Path("run")).resolved(8)


def test_a_sample_draws_the_same_wherever_it_is() -> None:
    whole, part = SampleRng(3, 7, range(8)), SampleRng(3, 7, [5, 2])
    for draw in (lambda c: c.normal(2, 3), lambda c: c.uniform(), lambda c: c.integers(1000, 4)):
        assert torch.equal(draw(whole)[[5, 2]], draw(part))
    assert whole.shared.random() == part.shared.random()
    assert not torch.equal(SampleRng(3, 8, [5]).normal(4), SampleRng(3, 7, [5]).normal(4))
    assert not torch.equal(SampleRng(4, 7, [5]).normal(4), SampleRng(3, 7, [5]).normal(4))
    numbers = SampleRng(0, 0, range(500)).normal(20)
    assert abs(numbers.mean()) < 0.04 and abs(numbers.std() - 1) < 0.04
