"""The training runs in a zoo card, read from their folders or from the table of an older card."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from far_runtime.errors import FarError
from far_training.loop.metrics import METRICS, read_metrics
from far_training.loop.state import STATE

TITLES = {"far": "FAR", "far_t2i": "FAR-T2I", "mar": "MAR", "var": "VAR", "klvae": "KL-VAE", "vqvae": "VQ-VAE"}
HOURS, LAST = "training hours", "loss at the end"


@dataclass(frozen=True)
class Run:
    """A finished training run."""

    folder: Path

    args: dict[str, Any]
    """Its options."""

    records: list[dict[str, float]]
    """Its metrics, in the order of the steps."""

    steps: int

    minutes: float
    """Time of the training steps."""

    @property
    def system(self) -> str:
        """The trained system, a key of TITLES."""
        return str(self.args["system"])

    def mean(self, name: str, last: int = 10) -> float:
        """Mean of a value over its last `last` records."""
        values = [record[name] for record in self.records if name in record]
        return float(np.mean(values[-last:]))


def open_run(folder: Path) -> Run:
    """Read a run's state and metrics; FarError where the folder has none."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise FarError(f"{folder / STATE}: no such file; give the folder of a finished run") from error
    return Run(folder, vars(state["args"]), read_metrics(folder / METRICS), state["step"], state["elapsed"] / 60)


def runs_of_card(card: Path) -> dict[str, Run]:
    """The runs in the table of a card, by title, with what the table has of each; FarError where it cannot be read."""
    try:
        text = card.read_text(encoding="utf-8")
    except OSError as error:
        raise FarError(f"{card}: cannot be read ({error.strerror}); leave --renew out for a new card") from error
    try:
        return _runs_of_table(text.partition("## Recipe")[2].splitlines(), card.parent)
    except (KeyError, ValueError, IndexError, StopIteration) as error:
        raise FarError(f"{card}: its table of runs cannot be read; leave --renew out for a new card") from error


def _runs_of_table(lines: list[str], folder: Path) -> dict[str, Run]:
    """The inverse of `run_table`."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    facts = {row[0]: row[1:] for row in rows[2:]}
    settings = set(list(facts)[list(facts).index(LAST) + 1 :])
    runs = {}
    for place, title in enumerate(rows[0][1:]):
        args: dict[str, Any] = {f"loss_{key}" if key in settings else key: facts[key][place] for key in facts}
        args["system"] = next(system for system, name in TITLES.items() if title.startswith(f"{name} ("))
        minutes, records = 60 * float(args.pop(HOURS)), [{"loss": float(args.pop(LAST))}]
        runs[title] = Run(folder, args, records, int(args.pop("steps")), minutes)
    return runs


def run_table(runs: dict[str, Run]) -> list[str]:
    """Markdown table of the options and results of each run."""
    keys = ("batch", "lr", "warmup", "schedule", "weight_decay", "beta2", "clip", "ema", "seed")
    lines = ["| | " + " | ".join(runs) + " |", "| --- |" + " --- |" * len(runs)]
    lines += [f"| {key} | " + " | ".join(str(run.args[key]) for run in runs.values()) + " |" for key in keys]
    lines.append("| steps | " + " | ".join(str(run.steps) for run in runs.values()) + " |")
    lines.append(f"| {HOURS} | " + " | ".join(f"{run.minutes / 60:.2f}" for run in runs.values()) + " |")
    lines.append(f"| {LAST} | " + " | ".join(f"{run.mean('loss'):.4f}" for run in runs.values()) + " |")
    settings = sorted({key for run in runs.values() for key in run.args if key.startswith("loss_")})
    for key in settings:
        lines.append(f"| {key[5:]} | " + " | ".join(str(run.args.get(key, "")) for run in runs.values()) + " |")
    return lines
