"""Several processes share a run, as under torchrun or `accelerate launch`, and micro-batches a step."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file

import training_processes
from far_models.checkpoint.load import load_checkpoint
from far_runtime.errors import FarError
from training_states import load_state

ROOT = Path(__file__).resolve().parents[3]


Run = Callable[..., Result]
STEPS = 4
MINUTES = 0.02
"""Length of a timed run."""


def losses_of(run: Path) -> list[list[float]]:
    """Loss and gradient norm of every step."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[record["loss"], record["gradient"]] for record in records if "loss" in record]


def launched(launcher: tuple[str, ...], *arguments: object) -> subprocess.CompletedProcess[str]:
    """`far train ARGUMENTS` under a launcher, on the CPU."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "models")])
    return subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "far_training", *map(str, arguments), "--threads", "1"],
        env={**os.environ, "PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("trainer", ["vae", "far", "mar", "far_t2i", "var", "residual"])
def test_micro_batches_are_the_whole_batch(
    trainer: str, inputs: dict[str, Any], pictures: Path, latents: Path, vae_run: Path, run_train: Run, tmp_path: Path
) -> None:
    on_latents = ("--data", latents, "--vae", vae_run / "vae.safetensors")
    against = ("--adversarial", 0.5, "--adversarial-from", 0, "--discriminator-width", 8)
    command = {
        "vae": ("vae", "--data", pictures, "--latent-noise", 0.3, *against),
        "far": ("far", *on_latents),
        **inputs,
    }[trainer]
    still = {
        "far": ("--dropout", 0),
        "mar": ("--dropout", 0),
        "var": ("--drop-path", 0),
        "residual": ("--drop-path", 0),
    }
    options = (*command, *still.get(trainer, ()), *(() if trainer in ("vae", "var") else ("--input-noise", 0.3)))
    for name, extra in (("whole", ()), ("micro", ("--accumulate", 2)), ("again", ("--checkpointing",))):
        run_train(*options, "-o", tmp_path / name, "--steps", STEPS, *extra)
    whole = np.array(losses_of(tmp_path / "whole"))
    assert len(whole) == STEPS
    np.testing.assert_allclose(losses_of(tmp_path / "micro"), whole, rtol=2e-5)
    np.testing.assert_allclose(losses_of(tmp_path / "again"), whole, rtol=2e-5)


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(
    latents: Path, vae_run: Path, run_train: Run, tiny_sizes: dict[str, list[str]], tmp_path: Path
) -> None:
    """Two processes of half the batch each, against one process with all of it: with a copy of the weights in each;
    the same run with split weights, micro-batches and blocks that are computed again; and again in one process."""
    data = ("--data", latents, "--vae", vae_run / "vae.safetensors", "--dropout", 0, "--input-noise", 0.3)
    run_train("far", *data, "-o", tmp_path / "one", "--steps", 6)
    # --multi_gpu is how several processes are had; ACCELERATE_USE_CPU puts them on the CPU.
    launcher = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    launcher = (*launcher, "--mixed_precision", "no", "--dynamo_backend", "no")
    done = launched(launcher, "far", *data, *tiny_sizes["far"], "-o", tmp_path / "two", "--steps", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "batch: 4 = 2 processes x 1 in turn x 2" in done.stdout
    assert done.stdout.count("done:") == 1
    run = (*data, "-o", tmp_path / "two", "--resume")
    command = ("far", *run, *tiny_sizes["far"], "--steps", 4, "--shard", "--accumulate", 2, "--checkpointing")
    assert "split over 2 processes" in training_processes.run(tmp_path / "output", *command, world=2)
    assert load_checkpoint(tmp_path / "two" / "far.safetensors", expect="far").classes == ("ant", "bee", "cat")
    run_train("far", *run, "--steps", 6, "--accumulate", 2)
    np.testing.assert_allclose(losses_of(tmp_path / "two"), losses_of(tmp_path / "one"), rtol=2e-5)


@pytest.mark.slow
def test_two_processes_resume_exactly(
    latents: Path, vae_run: Path, tiny_sizes: dict[str, list[str]], tmp_path: Path
) -> None:
    data = ("--data", latents, "--vae", vae_run / "vae.safetensors", "--input-noise", 0.3, *tiny_sizes["far"])
    for name, *steps in (("whole", 4), ("parts", 2, 4)):
        for count in steps:
            resume = ("--resume",) if count > steps[0] else ()
            command = ("far", *data, "-o", tmp_path / name, "--steps", count, *resume)
            training_processes.run(tmp_path / "output", *command, world=2)
    whole, parts = (load_file(tmp_path / name / "far.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole | parts)
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "parts")


@pytest.mark.slow
def test_two_processes_write_the_cache_of_one(latents: Path, pictures: Path, vae_run: Path, tmp_path: Path) -> None:
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    data = ("--data", pictures, "--vae", vae_run / "vae.safetensors", "-o", tmp_path / "cache")
    done = launched(launcher, "cache-latents", *data)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("wrote") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]
    for path in latents.glob("*.npy"):
        np.testing.assert_allclose(np.load(tmp_path / "cache" / path.name), np.load(path), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["vae", "vqvae"])
def test_two_processes_end_a_timed_run_together(trainer: str, pictures: Path, tmp_path: Path) -> None:
    """The clock of the main process counts for both: otherwise one would wait for ever for the other's last step. The
    VQ-VAE's processes exchange hits and new codes beside."""
    sizes = ("--ch", 8, "--multipliers", "1,2", "--channels", 4, "--batch", 4, "--amp", "off", "--log-steps", 1)
    command = (trainer, "--data", pictures, "-o", tmp_path / "run", "--minutes", MINUTES, *sizes)
    assert training_processes.run(tmp_path / "output", *command, world=2).count("done:") == 1
    assert (tmp_path / "run" / f"{trainer}.safetensors").exists()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(record["minutes"] for record in records) >= MINUTES


@pytest.mark.slow
def test_a_signal_stops_a_run_with_its_state_saved(pictures: Path, tmp_path: Path) -> None:
    sizes = ("--ch", 8, "--multipliers", "1,2", "--channels", 4, "--batch", 4, "--amp", "off", "--log-steps", 1)
    output = tmp_path / "output"
    command = ("vae", "--data", pictures, "-o", tmp_path / "run", "--steps", 1_000_000, *sizes)
    (process,) = training_processes.start(output, *command)
    while process.is_alive() and not (output.exists() and "step 3 " in output.read_text()):
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 0
    assert "--resume" in output.read_text().splitlines()[-1]
    assert load_state(tmp_path / "run")["step"] >= 3
    assert not list((tmp_path / "run").glob("*.part*"))
    assert not (tmp_path / "run" / "vae.safetensors").exists()


def test_a_run_in_micro_batches_resumes_exactly(latents: Path, vae_run: Path, run_train: Run, tmp_path: Path) -> None:
    data = ("far", "--data", latents, "--vae", vae_run / "vae.safetensors", "--accumulate", 2, "--checkpointing")
    run_train(*data, "-o", tmp_path / "straight", "--steps", 4)
    run_train(*data, "-o", tmp_path / "run", "--steps", 2)
    run_train(*data, "-o", tmp_path / "run", "--steps", 4, "--resume")
    resumed, straight = (load_state(tmp_path / run) for run in ("run", "straight"))
    for part in ("model", "model_ema"):
        assert all(torch.equal(tensor, straight[part][name]) for name, tensor in resumed[part].items()), part


def test_a_full_disk_leaves_the_state_before(
    pictures: Path, run_train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_train("vae", "--data", pictures, "-o", tmp_path / "run", "--steps", 1)

    def full(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(FarError, match=r"checkpoint-last\.pth: cannot be written \(No space left on device\)"):
            run_train("vae", "--data", pictures, "-o", tmp_path / "run", "--steps", 2, "--resume")
    assert load_state(tmp_path / "run")["step"] == 1
    assert not list((tmp_path / "run").glob("*.part*"))


def test_a_broken_state_does_not_replace_a_good_one(pictures: Path, run_train: Run, tmp_path: Path) -> None:
    run_train("vae", "--data", pictures, "-o", tmp_path / "run", "--steps", 1)
    wild = ("--steps", 3, "--resume", "--lr", 1e30, "--clip", 0, "--save-minutes", 0, "--log-steps", 100)
    with pytest.raises(FarError, match="the loss became"):
        run_train("vae", "--data", pictures, "-o", tmp_path / "run", *wild)
    assert math.isfinite(sum(float(tensor.sum()) for tensor in load_state(tmp_path / "run")["model"].values()))


def test_weights_are_split_among_several_processes_only(
    pictures: Path, run_train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FarError, match="one process alone"):
        run_train("vae", "--data", pictures, "-o", tmp_path / "run", "--steps", 1, "--shard")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(FarError, match="--use_fsdp cannot be used here"):
        run_train("vae", "--data", pictures, "-o", tmp_path / "run", "--steps", 1)


@pytest.mark.slow
def test_a_kill_while_writing_leaves_the_state_before(
    pictures: Path, run_train: Run, tiny_sizes: dict[str, list[str]], tmp_path: Path
) -> None:
    """The process is killed in the middle of writing the state of its second step."""
    run_train("vae", "--data", pictures, "-o", tmp_path / "run", "--steps", 1)
    command = ("vae", "--data", pictures, "-o", tmp_path / "run", "--steps", 2, "--resume", *tiny_sizes["vae"])
    training_processes.run(tmp_path / "output", *command, half_written=True)
    assert list((tmp_path / "run").glob("*.part*"))
    assert load_state(tmp_path / "run")["step"] == 1
    run_train("vae", "--data", pictures, "-o", tmp_path / "run", "--steps", 2, "--resume")
    assert load_state(tmp_path / "run")["step"] == 2
    assert not list((tmp_path / "run").glob("*.part*"))
