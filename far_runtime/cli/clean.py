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
@click.option("--stale", is_flag=True, help="Those that fit nowhere any more. Default without NAME and --all.")
@click.option("--all", "everything", is_flag=True, help="All of them.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
def clean(bundle: Path, names: tuple[str, ...], stale: bool, everything: bool, dry_run: bool) -> None:
    """Remove engines of BUNDLE that were compiled for it, by their names (far inspect lists them) or all.

    Without a name: the stale ones, that is what is damaged, of another export, built by another version of a library
    that is installed here, or left behind by a build that was killed. Engines for other devices stay.
    """
    from far_runtime.bundle import open_bundle
    from far_runtime.engines.cache.entry import size_of
    from far_runtime.engines.cache.store import EngineCache

    if sum((stale, everything, bool(names))) > 1:
        raise click.UsageError("NAME, --stale and --all exclude each other; give one")
    opened = open_bundle(bundle, check=False)
    cache = EngineCache(opened)
    total = 0
    for engine, reason in chosen(cache, opened, names, everything):
        size = engine.size
        if not dry_run:
            cache.remove(engine)
        total += size
        _say(dry_run, engine.name, size, reason)
    for path in [] if names else cache.leftovers():
        size = size_of(path)
        total += size
        _say(dry_run, path.name, size, "left behind by a build")
    if not dry_run:
        cache.clear_leftovers()
    click.echo(f"{total / 1e6:.1f} MB {'would be ' if dry_run else ''}freed" if total else "nothing to remove")


def chosen(
    cache: EngineCache, bundle: Bundle, names: tuple[str, ...], everything: bool
) -> list[tuple[CachedEngine, str]]:
    """The engines to remove, each with the reason; FarError for a name that is none's."""
    from far_runtime.engines.cache.compatibility import stale_reason
    from far_runtime.errors import FarError

    entries = [(engine, stale_reason(engine, bundle)) for engine in cache.entries()]
    if not names:
        return [(engine, reason) for engine, reason in entries if everything or reason]
    unknown = sorted(set(names) - {engine.name for engine, _ in entries})
    if unknown:
        have = ", ".join(engine.name for engine, _ in entries) or "none"
        raise FarError(f"{unknown[0]}: no engine of {bundle.path} has that name; it has: {have}")
    return [(engine, reason) for engine, reason in entries if engine.name in names]


def _say(dry_run: bool, name: str, size: int, reason: str) -> None:
    done = "would remove" if dry_run else "removed"
    click.echo(f"{done} {name}, {size / 1e6:.1f} MB" + (f": {reason}" if reason else ""))
