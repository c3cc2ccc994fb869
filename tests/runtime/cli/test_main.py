"""The command itself: it answers at once, joins commands by entry point, and never shows a traceback unasked."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
from typing import Any

import click
import pytest

from far_runtime import __version__
from far_runtime.errors import CheckFailed, FarError

HEAVY = ("numpy", "PIL", "rich", "onnxruntime", "torch", "onnx", "far_export", "far_models")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["edit", "--help"], ["generate", "--help"], ["inspect", "--help"], ["--version"]]
)
def test_help_imports_no_heavy_library(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom far_runtime.cli.main import main\n"
        f"try: main({arguments!r})\n"
        f"finally: print('loaded:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "loaded: []" in done.stdout


def test_generating_imports_no_torch(tiny: Any, tmp_path: Any) -> None:
    program = (
        "import sys\nfor name in ('torch', 'onnx', 'far_export', 'far_models'): sys.modules[name] = None\n"
        "from far_runtime.cli.main import main\n"
        f"main(['generate', {str(tiny.bundle)!r}, '-o', {str(tmp_path / 'a.png')!r}])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "a.png").is_file()


def test_help_lists_every_command_with_a_line(far: Any) -> None:
    shown = far("--help")
    assert shown.code == 0
    for command in ("demo", "edit", "export", "generate", "inspect", "train", "verify"):
        line = next(line for line in shown.out.splitlines() if line.split()[:1] == [command])
        assert len(line.split()) > 3
    assert far().out == shown.out
    assert far("--version").out == f"far-deploy, version {__version__}\n"


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Adds a command of the given behaviour, `far joined`, by an entry point."""

    def join(behaviour: Any, name: str = "joined") -> None:
        module = type(sys)("joined_module")
        module.command = click.command(name=name)(behaviour)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "joined_module", module)
        point = importlib.metadata.EntryPoint(name, "joined_module:command", "far.commands")
        monkeypatch.setattr(
            importlib.metadata, "entry_points", lambda group: [point] if group == "far.commands" else []
        )

    return join


def raises(error: BaseException) -> Any:
    def behaviour() -> None:
        raise error

    return behaviour


def test_a_command_joins_by_entry_point(far: Any, joined: Any) -> None:
    joined(lambda: click.echo("here"))
    assert far("joined").out == "here\n"
    assert "joined" in far("--help").out


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (FarError("no good; use another"), 2, "error: no good; use another"),
        (CheckFailed("too far off"), 1, "error: too far off"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (PermissionError(13, "Permission denied", "/some/file"), 2, "error: /some/file: Permission denied"),
        (OSError(28, "No space left on device"), 2, "error: No space left on device"),
        (click.FileError("a.txt", "broken"), 1, "error: Could not open file 'a.txt': broken"),
        (ValueError("two\nlines"), 70, "error: unexpected ValueError: two lines; run it again with --debug"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    far: Any, joined: Any, error: BaseException, code: int, line: str
) -> None:
    joined(raises(error))
    result = far("joined")
    assert (result.code, result.out) == (code, "")
    assert result.err.strip().startswith(line)
    assert result.err.strip().count("\n") == 0


@pytest.mark.parametrize("arguments", [["--debug", "joined"], ["joined", "--debug"]])
def test_debug_shows_the_traceback(far: Any, joined: Any, arguments: list[str]) -> None:
    joined(raises(FarError("no good")))
    result = far(*arguments)
    assert result.code == 2
    assert "Traceback (most recent call last)" in result.err
    assert result.err.endswith("error: no good\n")


@pytest.mark.parametrize(("command", "extra"), [("export", "export"), ("verify", "export"), ("train", "train")])
def test_a_command_without_torch_names_the_extra(
    far: Any, joined: Any, monkeypatch: pytest.MonkeyPatch, command: str, extra: str
) -> None:
    joined(lambda: importlib.import_module("torch"), command)  # when it runs
    monkeypatch.setitem(sys.modules, "torch", None)
    hint = f"install it with: pip install 'far-deploy[{extra}]'\n"
    result = far(command)
    assert result.code == 2
    assert result.err.startswith(f"error: far {command} needs torch") and result.err.endswith(hint)
    monkeypatch.setitem(sys.modules, "joined_module", None)  # when it is loaded
    result = far(command)
    assert result.code == 2
    assert result.err.endswith(hint)
    assert command in far("--help").out


def test_a_missing_module_of_our_own_commands_is_not_blamed_on_torch(far: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "far_runtime.bundle", None)
    result = far("inspect", "x")
    assert result.code == 70
    assert "far_runtime.bundle" in result.err


def test_unknown_commands_and_options(far: Any) -> None:
    assert far("draw").err == "error: No such command 'draw'. (see far --help)\n"
    assert far("generate", "--nothing").err.endswith("(see far generate --help)\n")
    assert far("generate", "--nothing").code == 2
