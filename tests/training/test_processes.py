"""Several processes share a run, as under torchrun or `accelerate launch`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vae", "vqvae"])
def test_two_processes_end_a_timed_run_together(kind: str, pictures: Path, tmp_path: Path) -> None:
    """The clock of the main process counts for both: otherwise one would wait for ever for the other's last step. The
    VQ-VAE's processes exchange hits and new codes beside."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "models")])
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *("-m", "far_models.training", kind, "--data", str(pictures), "-o", str(tmp_path / "run")),
        *("--minutes", "0.03", "--ch", "8", "--multipliers", "1,2", "--channels", "4", "--batch", "4"),
        *("--amp", "off", "--threads", "1", "--log-steps", "1"),
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("done:") == 1
    assert (tmp_path / "run" / f"{kind}.safetensors").exists()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(record["minutes"] for record in records) >= 0.03
