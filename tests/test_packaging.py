"""What setup.cfg and constraints.txt promise: all packages listed, all pins there, a small base install."""

from __future__ import annotations

import configparser
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE_ROOTS = {"far_runtime": ROOT, "far_export": ROOT, "far_models": ROOT / "models", "far_training": ROOT / "models"}


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment]
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


def project(requirement: str) -> str:
    """Normalised name of the project in a requirement, without version and extras."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name, requirement
    return re.sub(r"[-_.]+", "-", name.group()).lower()


def extras(setup: configparser.ConfigParser) -> dict[str, set[str]]:
    return {name: {project(line) for line in lines(text)} for name, text in setup["options.extras_require"].items()}


def test_every_package_on_disk_is_listed(setup: configparser.ConfigParser) -> None:
    on_disk = {
        ".".join(file.parent.relative_to(root).parts)
        for top, root in SOURCE_ROOTS.items()
        for file in (root / top).rglob("__init__.py")
    }
    assert set(lines(setup["options"]["packages"])) == on_disk


def test_every_folder_of_data_files_is_listed(setup: configparser.ConfigParser) -> None:
    """Pages, templates and styles; a wheel has no file that is not listed."""
    on_disk = {
        f"{top}/{file.parent.relative_to(root / top)}/*"
        for top, root in SOURCE_ROOTS.items()
        for file in (root / top).rglob("*")
        if file.suffix in {".html", ".css", ".js", ".jinja"}
    }
    listed = {f"{top}/{line}" for top, text in setup["options.package_data"].items() for line in lines(text)}
    assert on_disk and on_disk <= listed


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {file.parent for top, root in SOURCE_ROOTS.items() for file in (root / top).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_the_contract_of_the_command_line_names_every_other_module() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("Python 3.10 has no tomllib")
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = {contract["id"]: contract for contract in settings["tool"]["importlinter"]["contracts"]}
    names = {path.stem for path in (ROOT / "far_runtime").iterdir() if path.suffix == ".py" or path.is_dir()}
    others = {f"far_runtime.{name}" for name in names if not name.startswith("_") and name != "cli"}
    assert set(contracts["runtime-cli-on-top"]["source_modules"]) == others


def test_base_install_is_small(setup: configparser.ConfigParser) -> None:
    assert {project(line) for line in lines(setup["options"]["install_requires"])} == {
        "click",
        "numpy",
        "pillow",
        "rich",
    }


def test_the_two_onnxruntimes_never_meet(setup: configparser.ConfigParser) -> None:
    with_runtime = {
        name: wanted & {"onnxruntime", "onnxruntime-gpu"}
        for name, wanted in extras(setup).items()
        if wanted & {"onnxruntime", "onnxruntime-gpu"}
    }
    assert with_runtime == {"cpu": {"onnxruntime"}, "gpu": {"onnxruntime-gpu"}}


def test_constraints_pin_what_the_make_targets_install(setup: configparser.ConfigParser) -> None:
    pins = lines((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    assert [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin)] == []
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    installed = {name for group in re.findall(r"'\.\[([a-z,]+)\]'", makefile) for name in group.split(",")}
    assert installed >= {"cpu", "export", "train", "dev"}
    wanted = set().union(*(extras(setup)[name] for name in installed))
    wanted |= {project(line) for line in lines(setup["options"]["install_requires"])}
    pinned = {project(pin) for pin in pins}
    assert wanted - pinned == set()
    # cuda-python is bindings alone; the libraries of CUDA itself come in packages of nvidia-*.
    assert [name for name in pinned if name.startswith("nvidia") or name == "onnxruntime-gpu"] == []


DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))


def copied(dockerfile: Path) -> list[str]:
    """What a Dockerfile copies from the checkout."""
    text = dockerfile.read_text(encoding="utf-8").replace("\\\n", " ")
    return [name for line in text.splitlines() if line.startswith("COPY ") for name in line.split()[1:-1]]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_containers_copy_what_an_install_needs(setup: configparser.ConfigParser, dockerfile: Path) -> None:
    """Every file is there and let through by .dockerignore, and no package is left out."""
    names = copied(dockerfile)
    assert [name for name in names if not (ROOT / name).exists()] == []
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").split() if line[0] == "!"}
    assert set(names) == let_through
    roots = {name.partition(".")[0] for name in lines(setup["options"]["packages"])}
    assert {Path(name).name for name in names} >= roots
    readme, licences = setup["metadata"]["long_description"], lines(setup["metadata"]["license_files"])
    assert {readme.removeprefix("file: "), *licences, "setup.cfg", "pyproject.toml"} <= set(names)


def test_there_is_a_container_for_jetson_and_one_for_other_gpus() -> None:
    assert [path.name for path in DOCKERFILES] == ["Dockerfile.gpu", "Dockerfile.l4t"]
