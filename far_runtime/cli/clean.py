"""`far clean`: remove compiled engines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from far_runtime.bundle import Bundle
    from far_runtime.engines.cache.entry import CachedEngine
    from far_runtime.engines.cache.store import EngineCache


@click.command(short_help="Remove a bundle's compiled engines.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option(
    "--stale", is_flag=True, help="Remove the engines that cannot be used any more; the default without NAME and --all."
)
@click.option("--all", "everything", is_flag=True, help="Remove all engines.")
@click.option("--dry-run", is_flag=True, help="Print what would be removed, and remove nothing.")
def clean(bundle: Path, names: tuple[str, ...], stale: bool, everything: bool, dry_run: bool) -> None:
    """Remove compiled engines of BUNDLE: stale ones, those of the names that far inspect lists, or all.

    An engine is stale if it is damaged, belongs to another export, or was built by a version of its library other than
    the installed one. What a killed build has left is removed too. Engines for other devices stay.
    """
    from far_runtime.bundle import open_bundle
    from far_runtime.engines.cache.entry import size_of
    from far_runtime.engines.cache.store import EngineCache

    if sum((stale, everything, bool(names))) > 1:
        raise click.UsageError("NAME, --stale and --all exclude each other; give one")
    opened = open_bundle(bundle, check=False)
    cache = EngineCache(opened)
    total = 0
    for engine, reason in select_engines(cache, opened, names, everything):
        size = engine.size
        if not dry_run:
            cache.remove(engine)
        total += size
        _report(dry_run, engine.name, size, reason)
    for path in [] if names else cache.leftovers():
        size = size_of(path)
        total += size
        _report(dry_run, path.name, size, "left behind by a build")
    if not dry_run:
        cache.clear_leftovers()
    click.echo(f"{total / 1e6:.1f} MB {'would be ' if dry_run else ''}freed" if total else "nothing to remove")


def select_engines(
    cache: EngineCache, bundle: Bundle, names: tuple[str, ...], everything: bool
) -> list[tuple[CachedEngine, str]]:
    """The engines to remove, each with the reason why it is stale or ""; FarError for an unknown name."""
    from far_runtime.engines.cache.compatibility import stale_reason
    from far_runtime.errors import FarError

    entries = [(engine, stale_reason(engine, bundle)) for engine in cache.entries()]
    if not names:
        return [(engine, reason) for engine, reason in entries if everything or reason]
    unknown = sorted(set(names) - {engine.name for engine, _ in entries})
    if unknown:
        known = ", ".join(engine.name for engine, _ in entries) or "none"
        raise FarError(f"{unknown[0]}: no engine of {bundle.path} has that name; it has: {known}")
    return [(engine, reason) for engine, reason in entries if engine.name in names]


def _report(dry_run: bool, name: str, size: int, reason: str) -> None:
    """Print a line about one engine."""
    action = "would remove" if dry_run else "removed"
    click.echo(f"{action} {name}, {size / 1e6:.1f} MB" + (f": {reason}" if reason else ""))
