"""`far inspect`: the contents of a bundle and the cost of a picture, as tables or JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.table import Table

NAMES_SHOWN = 100


@click.command(short_help="Show the contents of a bundle and the cost of a picture.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, with complete checksums.")
@click.option("--no-check", is_flag=True, help="Do not compare the bundle with its checksums first.")
def inspect(bundle: Path, as_json: bool, no_check: bool) -> None:
    """Show the contents of BUNDLE: stages, default schedule, presets, arithmetic of a picture, files and classes.

    Stages come with shapes, parameters and arithmetic. GFLOP are 10^9 operations; a multiply-add is two operations.
    Compiled engines are listed too, with the reason where one cannot be used on this machine.
    """
    from far_runtime.bundle import open_bundle
    from far_runtime.inspection import inspect_bundle

    facts = inspect_bundle(open_bundle(bundle, check=not no_check))
    facts["checked"] = not no_check
    if as_json:
        click.echo(json.dumps(facts, indent=1))
    else:
        _print_tables(facts)


def _print_tables(facts: dict[str, Any]) -> None:
    """Print the facts of `inspect_bundle` for people."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
    size = sum(record["bytes"] for record in facts["files"].values())
    console.print(f"{facts['path']}: {facts['system']} bundle {facts['id']}, {facts['precision']}, {size / 1e6:.1f} MB")
    console.print(_model_line(facts["model"]))
    for part, source in facts["source"].items():
        text = ", ".join(f"{key} {value}" for key, value in source.items()) if isinstance(source, dict) else source
        console.print(f"{part}: {text}")
    if facts["created_by"]:
        console.print(f"made by {facts['created_by']}")
    tables = [
        _graph_table(facts), _schedule_table(facts), _preset_table(facts), _cost_table(facts), _file_table(facts)
    ]  # fmt: skip
    for table in [*tables, _engine_table(facts)] if facts["engines"] else tables:
        console.print()
        console.print(table)
    console.print()
    console.print(_class_line(facts["classes"]))


def _model_line(model: dict[str, Any]) -> str:
    """The network's properties, of those that its system has."""
    facts = [] if "masked" not in model else ["masked" if model["masked"] else "unmasked"]
    facts += [f"{model['grid']} x {model['grid']} x {model['channels']} latents", f"{model['image_size']} pixels"]
    facts.append("draws from text" if model.get("condition") == "text" else f"{model['classes']} classes")
    return ", ".join(facts + ([f"predicts {model['prediction']}"] if "prediction" in model else []))


def _table(title: str, **columns: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for name, justify in columns.items():
        table.add_column(name.replace("_", " "), justify=justify, overflow="fold")  # type: ignore[arg-type]
    return table


def _graph_table(facts: dict[str, Any]) -> Table:
    table = _table(
        "Stages", graph="left", precision="left", inputs="left", outputs="left", parameters="right", GFLOP_a_row="right"
    )
    for graph in facts["graphs"]:
        inputs, outputs = ("\n".join(_tensor(spec) for spec in graph[side]) for side in ("inputs", "outputs"))
        table.add_row(
            graph["name"], graph["precision"], inputs, outputs, f"{graph['parameters']:,}", _polynomial(graph["flops"])
        )
    return table


def _polynomial(flops: dict[str, float]) -> str:
    """GFLOP per row of a batch as a polynomial in the graph's other axes: "1.2 + 0.03 count"."""
    return " + ".join(f"{_number(value / 1e9)} {term}".strip() for term, value in flops.items() if value)


def _number(value: float) -> str:
    return f"{value:,.2f}" if value >= 1 else f"{value:.3g}"


def _tensor(spec: dict[str, Any]) -> str:
    return f"{spec['name']} {spec['dtype']} [{', '.join(map(str, spec['shape']))}]"


def _schedule_table(facts: dict[str, Any]) -> Table:
    rows = facts["schedule"]
    fixed = ("kind", "number", "inner", "guidance", "constants", "graph", "gflop")
    details = [name for name in rows[0] if name not in fixed]
    columns = {rows[0]["kind"]: "right", "diffusion_steps": "right", "guidance": "right"}
    table = _table("Default schedule", **columns, **dict.fromkeys(details, "right"), GFLOP="right", graph="left")
    for row in rows:
        table.add_row(
            str(row["number"]), str(row["inner"]), f"{row['guidance']:.3g}", *(f"{row[name]:.4g}" for name in details),
            _number(row["gflop"]), row["graph"],
        )  # fmt: skip
    return table


def _preset_table(facts: dict[str, Any]) -> Table:
    table = _table("Presets", preset="left", GFLOP="right", distance="right", settings="left")
    for preset in facts["presets"]:
        ratio = preset["measured"].get("ratio")
        distance = "1" if preset["name"] == "official" else "not tuned" if ratio is None else f"{ratio:.3f}"
        settings = ", ".join(
            f"{name} {','.join(map(str, value)) if isinstance(value, list) else value}"
            for name, value in preset["settings"].items()
            if value is not None
        )
        table.add_row(preset["name"], _number(preset["gflop"]), distance, settings)
    return table


def _cost_table(facts: dict[str, Any]) -> Table:
    table = _table("One picture", stage="left", GFLOP="right", share="right")
    total = facts["gflop_total"]
    for stage, gflop in facts["gflop"].items():
        table.add_row(stage, _number(gflop), f"{100 * gflop / total:.1f} %" if total else "")
    table.add_row("total", _number(total), "")
    return table


def _file_table(facts: dict[str, Any]) -> Table:
    table = _table("Files", file="left", bytes="right", SHA_256="left")
    for name, record in facts["files"].items():
        table.add_row(name, f"{record['bytes']:,}", record["sha256"][:16])
    table.caption = "all as exported" if facts["checked"] else "not compared with the files"
    table.caption_justify = "left"
    return table


def _engine_table(facts: dict[str, Any]) -> Table:
    table = _table("Engines", name="left", precision="left", device="left", version="left", MB="right", age="right")
    table.add_column("here", overflow="fold")
    for engine in facts["engines"]:
        table.add_row(
            engine["name"], engine["precision"], engine["device"], engine["version"], f"{engine['bytes'] / 1e6:.1f}",
            _age(engine["created"]), engine["misfit"] or "fits",
        )  # fmt: skip
    table.caption = "far clean removes what fits nowhere any more"
    table.caption_justify = "left"
    return table


def _age(created: float) -> str:
    """Time since `created` (in seconds since 1970) in its largest unit; "" where it is not known."""
    seconds = max(time.time() - created, 0)
    for length, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if created and seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'s' if count > 1 else ''}"
    return "now" if created else ""


def _class_line(names: list[str]) -> str:
    if not names:
        return "Classes have no names."
    shown = list(enumerate(names))
    if len(names) > NAMES_SHOWN:
        shown = shown[:5]
    text = ", ".join(f"{number} {name}" for number, name in shown)
    return f"Classes: {text}" + (f", ... {len(names) - 1} {names[-1]}" if len(shown) < len(names) else "")
