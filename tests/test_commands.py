"""No command and no option of an earlier version is lost: scripts and notebooks of users name them."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

KNOWN = Path(__file__).parent / "commands.txt"
"""A line for each command with all its arguments and options. A new one is added here; a removed one is a break."""


def commands(group: click.Group, name: str) -> dict[str, set[str]]:
    """The arguments and options of every command below a group, by the command's full name."""
    context, options = click.Context(group), {}
    for child in group.list_commands(context):
        command = group.get_command(context, child)
        assert command is not None
        parameters = command.params
        options[f"{name} {child}"] = {text for each in parameters for text in (*each.opts, *each.secondary_opts)}
        if isinstance(command, click.Group):
            options |= commands(command, f"{name} {child}")
    return options


def test_every_command_has_the_options_that_it_had() -> None:
    pytest.importorskip("torch")
    from far_runtime.cli.main import cli

    lines = (line.partition(": ") for line in KNOWN.read_text(encoding="utf-8").splitlines())
    known = {name: set(options.split()) for name, _, options in lines}
    now = commands(cli, "far")
    assert set(known) == set(now)
    assert {name: known[name] ^ now[name] for name in now if known[name] != now[name]} == {}
