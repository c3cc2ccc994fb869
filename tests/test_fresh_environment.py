"""A base install with only onnxruntime draws from a bundle, and torch is not there; on Python 3.10 too."""

from __future__ import annotations

import shutil
import subprocess
import venv
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


OLDEST = "3.10"
"""What JetPack 6 has."""


def copied_source(source: Path) -> Path:
    """What the repository holds of the packages: a build leaves files behind, which do not belong into the checkout."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    for name in tracked:
        if name.endswith((".py", ".cfg", ".toml", ".md", ".typed", "LICENSE", "NOTICE")) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    return source


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new virtual environment in which `.[cpu]` is installed, not editable."""
    folder = tmp_path_factory.mktemp("fresh")
    source = copied_source(folder / "source")
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


def oldest_python() -> str | None:
    """An interpreter of the oldest Python that the runtime supports, from the path or from pyenv."""
    found = sorted(Path.home().glob(f".pyenv/versions/{OLDEST}.*/bin/python{OLDEST}"))
    candidates = [path for path in (shutil.which(f"python{OLDEST}"), *map(str, reversed(found))) if path]
    works = (
        path for path in candidates if subprocess.run([path, "-c", "import venv"], capture_output=True).returncode == 0
    )
    return next(works, None)


@pytest.mark.slow
def test_the_wheel_draws_on_the_oldest_python(python: Path, tiny: Any, tmp_path: Path) -> None:
    """As on a Jetson with JetPack 6: the wheel alone, with the newest libraries that there are for that Python."""
    oldest = oldest_python()
    if oldest is None:
        pytest.skip(f"no Python {OLDEST} on this machine")
    build = ("-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, copied_source(tmp_path / "source"))
    assert run(python, *build, folder=tmp_path).returncode == 0
    (wheel,) = tmp_path.glob("far_deploy-*.whl")
    assert run(Path(oldest), "-m", "venv", tmp_path / "venv", folder=tmp_path).returncode == 0
    interpreter = tmp_path / "venv" / "bin" / "python"
    installed = run(interpreter, "-m", "pip", "install", "-q", f"{wheel}[cpu]", folder=tmp_path)
    assert installed.returncode == 0, installed.stderr
    assert "No module named 'torch'" in run(interpreter, "-c", "import torch", folder=tmp_path).stderr
    for bundle in (tiny.bundle, tiny.mar_bundle):
        drawn = far(interpreter, "generate", bundle, "--label", 1, "-o", "out.png", folder=tmp_path)
        assert drawn.returncode == 0, drawn.stderr
    assert run(interpreter, "-m", "compileall", "-q", site_packages(interpreter), folder=tmp_path).returncode == 0


def site_packages(interpreter: Path) -> Path:
    """Where the runtime is installed."""
    return next((interpreter.parents[1] / "lib").glob("python*")) / "site-packages" / "far_runtime"
