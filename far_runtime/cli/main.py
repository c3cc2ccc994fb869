"""The `far` command; those of its commands that need torch are added by entry points."""

from __future__ import annotations

import importlib
import signal
import sys
import traceback
from collections.abc import Sequence

import click

from far_runtime import __version__
from far_runtime.cli.option_names import with_options
from far_runtime.errors import CheckFailed, FarError

BUILT_IN = {
    "bench": "far_runtime.cli.bench",
    "build": "far_runtime.cli.build",
    "clean": "far_runtime.cli.clean",
    "edit": "far_runtime.cli.edit",
    "export-triton": "far_runtime.cli.export_triton",
    "generate": "far_runtime.cli.generate",
    "inspect": "far_runtime.cli.inspect",
    "sample": "far_runtime.cli.sample",
    "serve": "far_runtime.cli.serve",
}

SUMMARIES = {
    "bench": "Compare engines: time, memory and arithmetic.",
    "build": "Compile a bundle's stages for an engine.",
    "clean": "Remove a bundle's compiled engines.",
    "demo": "Export the model of models/zoo, draw from it and verify it.",
    "evaluate": "Measure the quality of a bundle's pictures.",
    "edit": "Redraw a part of a picture, or extend it.",
    "export": "Export a checkpoint as a bundle of ONNX stages.",
    "export-triton": "Make a model repository for Triton Inference Server.",
    "generate": "Draw pictures from a bundle.",
    "inspect": "Show the contents of a bundle and the cost of a picture.",
    "sample": "Draw many pictures into sharded files, on one machine or many.",
    "serve": "Serve pictures from bundles over HTTP.",
    "train": "Train a VAE and a model.",
    "tune": "Find the cheapest settings that keep the pictures' distribution.",
    "verify": "Compare a bundle with its checkpoint, stage by stage.",
}
"""One line per command; they stand here so that `far --help` need not import the commands."""

EXTRAS = {"train": "train"}
"""The extra of setup.cfg that a command of an entry point needs; the others need `export`."""

UNEXPECTED = 70
"""Exit code for an error that is not the user's: EX_SOFTWARE of sysexits.h."""


class FarGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*BUILT_IN, *_plugins()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in BUILT_IN:
            return getattr(importlib.import_module(BUILT_IN[cmd_name]), cmd_name.replace("-", "_"))  # type: ignore[no-any-return]
        module, _, name = _plugins().get(cmd_name, "").partition(":")
        if not module:
            return None
        try:
            return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]
        except ImportError as error:
            raise _needs(cmd_name, error) from error

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            command = ctx.invoked_subcommand
            if command is None or command in BUILT_IN:
                raise
            raise _needs(command, error) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, SUMMARIES.get(name, "")) for name in self.list_commands(ctx)])


def _plugins() -> dict[str, str]:
    """`module:attribute` of the commands that installed packages add, by name."""
    from importlib.metadata import entry_points

    return {point.name: point.value for point in entry_points(group="far.commands")}


def _needs(command: str, error: ImportError) -> FarError:
    """The error for a command whose library is not installed."""
    module = (error.name or "torch").partition(".")[0]
    extra = EXTRAS.get(command, "export")
    return FarError(f"far {command} needs {module} ({error}); install it with: pip install 'far-deploy[{extra}]'")


@click.group(cls=FarGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="far-deploy")
@click.option("--debug", is_flag=True, help="Print the traceback of an error; allowed anywhere on the line.")
def cli(debug: bool) -> None:
    """Export FAR models to bundles, and draw pictures from bundles without torch."""


def main(args: Sequence[str] | None = None) -> None:
    """Run `far` and exit: 0, 1 for a failed check, 2 for bad input, 130 when interrupted, with one line on stderr."""
    arguments = list(sys.argv[1:] if args is None else args) or ["--help"]
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    # Unfinished files are removed, as after Ctrl-C.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        result = cli.main(args=arguments, prog_name="far", standalone_mode=False)
    except (click.Abort, KeyboardInterrupt):
        _exit("interrupted", 130, debug)
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "far"
        _exit(f"error: {error.format_message()} (see {where} --help)", error.exit_code, debug)
    except click.ClickException as error:
        _exit(f"error: {error.format_message()}", error.exit_code, debug)
    except CheckFailed as error:
        _exit(f"error: {with_options(error)}", 1, debug)
    except FarError as error:
        _exit(f"error: {with_options(error)}", 2, debug)
    except OSError as error:
        path = f"{error.filename}: " if error.filename else ""
        _exit(f"error: {path}{error.strerror or error}; is there room, and may it be read and written?", 2, debug)
    except Exception as error:
        detail = f"{type(error).__name__}: {error}"
        _exit(f"error: unexpected {detail}; run it again with --debug and report what it shows", UNEXPECTED, debug)
    sys.exit(result if isinstance(result, int) else 0)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _exit(line: str, code: int, debug: bool) -> None:
    """Print one line on stderr, after the traceback with --debug, and exit."""
    if debug:
        traceback.print_exc()
    click.echo(line.replace("\n", " "), err=True)
    sys.exit(code)
