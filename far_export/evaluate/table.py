"""What `far evaluate` prints: its figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from far_export.evaluate.figures import Figures


def table(made: Figures) -> Table:
    """A row per reference."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    what = "features of Inception" if made.inception else f"features of {made.network}: no FID"
    shown = Table(title=f"{made.count} pictures, {what}", box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    shown.add_column("reference")
    distance = "FID" if made.inception else "Frechet"
    columns = ("pictures", distance, "floor", "x floor", f"{distance} on 48", "floor", "x floor", "precision", "recall")
    for column in columns:
        shown.add_column(column, justify="right")
    for one in made.against:
        distances = (
            one.frechet, one.floor, one.times_floor, one.frechet_48, one.floor_48, one.times_floor_48
        )  # fmt: skip
        shown.add_row(
            one.reference, "" if one.pictures is None else str(one.pictures),
            *(_number(value, ".2f") for value in distances),
            *(_number(value, ".3f") for value in (one.precision, one.recall)),
        )  # fmt: skip
    return shown


def remarks(made: Figures) -> list[str]:
    """The score, and what is not in the table for which reason."""
    name = "inception score" if made.inception else f"score by {made.network}'s classes (no inception score)"
    lines = [] if made.score is None else [f"{name}: {made.score:.2f} ± {made.score_deviation:.2f}"]
    lines += [f"{name}: {why}" for why in made.missing]
    return lines + [f"{one.reference}: {line}" for one in made.against for line in (*one.notes, *one.missing)]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
