"""A base install with only onnxruntime draws from a bundle, and torch is not there."""

from __future__ import annotations

import subprocess
import venv
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new virtual environment in which `.[cpu]` is installed, not editable."""
    folder = tmp_path_factory.mktemp("fresh")
    source = folder / "source"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    for name in tracked:  # a build leaves files behind: not in the checkout
        if name.endswith((".py", ".cfg", ".toml", ".md", ".typed", "LICENSE", "NOTICE")) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    venv.create(folder / "venv", with_pip=True)
    interpreter = folder / "venv" / "bin" / "python"
    install = [interpreter, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", f"{source}[cpu]"]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return interpreter


def run(python: Path, *command: object, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(python), *map(str, command)], cwd=folder, capture_output=True, text=True)


def far(python: Path, *arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(python.with_name("far")), *map(str, arguments)], cwd=folder, capture_output=True, text=True
    )


@pytest.mark.slow
def test_generates_without_torch(python: Path, tiny: Any, tmp_path: Path) -> None:
    assert "No module named 'torch'" in run(python, "-c", "import torch", folder=tmp_path).stderr
    drawn = far(python, "generate", tiny.bundle, "--label", 1, "--count", 2, "-o", "out.png", folder=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    shown = far(python, "inspect", tiny.bundle, folder=tmp_path)
    assert shown.returncode == 0, shown.stderr


@pytest.mark.slow
def test_commands_that_need_torch_say_so(python: Path, tiny: Any, tmp_path: Path) -> None:
    """They are listed, and name the extra to install."""
    listed = far(python, "--help", folder=tmp_path)
    assert listed.returncode == 0
    assert all(name in listed.stdout for name in ("generate", "inspect", "export", "verify", "train", "demo"))
    tried = far(python, "export", tiny.far, "--vae", tiny.vae, "-o", "b", folder=tmp_path)
    assert tried.returncode == 2
    assert "pip install 'far-deploy[export]'" in tried.stderr
    assert len(tried.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_the_base_install_is_small(python: Path, tmp_path: Path) -> None:
    """numpy, click, Pillow and rich with what they need, and onnxruntime; no other engine, no torch, no onnx."""
    listed = run(python, "-m", "pip", "list", "--format", "freeze", folder=tmp_path).stdout.lower()
    names = {line.partition("==")[0] for line in listed.split()}
    assert {"numpy", "click", "pillow", "rich", "onnxruntime", "far-deploy"} <= names
    assert not names & {"torch", "onnx", "onnxscript", "safetensors", "openvino", "onnxruntime-gpu", "matplotlib"}
