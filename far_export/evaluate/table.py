"""What `far evaluate` prints: its metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from far_export.evaluate.evaluation import Evaluation


def table(evaluation: Evaluation) -> Table:
    """A row per reference."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    what = "features of Inception" if evaluation.inception else f"features of {evaluation.network}: no FID"
    title = f"{evaluation.count} pictures, {what}"
    rows = Table(title=title, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    rows.add_column("reference")
    distance = "FID" if evaluation.inception else "Frechet"
    columns = ("pictures", distance, "floor", "x floor", f"{distance} on 48", "floor", "x floor", "precision", "recall")
    for column in columns:
        rows.add_column(column, justify="right")
    for row in evaluation.against:
        distances = (row.frechet, row.floor, row.times_floor, row.frechet_48, row.floor_48, row.times_floor_48)
        rows.add_row(
            row.reference, "" if row.pictures is None else str(row.pictures),
            *(_number(value, ".2f") for value in distances),
            *(_number(value, ".3f") for value in (row.precision, row.recall)),
        )  # fmt: skip
    return rows


def remarks(evaluation: Evaluation) -> list[str]:
    """The inception score, and why metrics are missing in the table."""
    name = "inception score"
    if not evaluation.inception:
        name = f"score by {evaluation.network}'s classes (no inception score)"
    lines = []
    if evaluation.score is not None:
        lines.append(f"{name}: {evaluation.score:.2f} ± {evaluation.score_deviation:.2f}")
    lines += [f"{name}: {reason}" for reason in evaluation.missing]
    return lines + [f"{row.reference}: {line}" for row in evaluation.against for line in (*row.notes, *row.missing)]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
