"""`far inspect`: what a bundle holds, and what a picture costs."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.table import Table

NAMES_SHOWN = 100


@click.command(short_help="Show what a bundle holds and what a picture costs.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON, checksums in full.")
@click.option("--no-check", is_flag=True, help="Do not compare the files with their checksums.")
def inspect(bundle: Path, as_json: bool, no_check: bool) -> None:
    """Show the stages of BUNDLE with shapes, parameters and sizes, its default schedule, the arithmetic of a picture by
    stage (a multiply-add is two operations), classes and checksums."""
    from far_runtime.bundle import open_bundle

    facts = describe(open_bundle(bundle, check=not no_check))
    facts["checked"] = not no_check
    if as_json:
        click.echo(json.dumps(facts, indent=1))
    else:
        _show(facts)


def describe(bundle: Any) -> dict[str, Any]:
    """All that `far inspect` shows, as plain values."""
    from far_runtime.sampling.flops import picture_cost, step_flops
    from far_runtime.sampling.settings import check_system, resolve_plan

    check_system(bundle)
    manifest = bundle.manifest
    settings, plan = resolve_plan(manifest)
    gflop = {stage: flops / 1e9 for stage, flops in picture_cost(manifest, plan).items()}
    rows = [
        {
            "kind": step.kind,
            "number": step.number,
            "inner": step.substeps,
            "guidance": step.guidance,
            **step.details,
            "constants": dict(step.constants),
            "graph": manifest.graph(step.calls[0].stage, step.calls[0].constants).name,
            "gflop": step_flops(manifest, step) / 1e9,
        }
        for step in plan
    ]
    return {
        "path": str(bundle.path),
        "id": manifest.id,
        "system": manifest.system,
        "precision": manifest.precision,
        "created_by": manifest.created_by,
        "source": manifest.source,
        "model": manifest.model.to_json(),
        "defaults": settings,
        "schedule": rows,
        "presets": presets(manifest),
        "gflop": gflop,
        "gflop_total": sum(gflop.values()),
        "graphs": [asdict(graph) for graph in manifest.graphs],
        "files": {name: asdict(record) for name, record in manifest.files.items()},
        "classes": list(manifest.classes),
        "engines": engines(bundle),
    }


def presets(manifest: Any) -> list[dict[str, Any]]:
    """The named settings of a bundle, and what a picture costs with each. measured: by `far tune` ({}: not tuned).

    Those that its graphs cannot compute, which are of some levels only, are left out.
    """
    from far_runtime.errors import FarError
    from far_runtime.sampling.flops import picture_cost
    from far_runtime.sampling.presets import preset_names, preset_of
    from far_runtime.sampling.settings import resolve_plan

    found = []
    for name in preset_names(manifest):
        try:
            settings, plan = resolve_plan(manifest, {"preset": name})
        except FarError:
            continue
        gflop = sum(picture_cost(manifest, plan).values()) / 1e9
        measured = dict(preset_of(manifest, name).measured)
        found.append({"name": name, "settings": settings, "measured": measured, "gflop": gflop})
    return found


def engines(bundle: Any) -> list[dict[str, Any]]:
    """What was compiled from the bundle, newest first. misfit: why it cannot be used here, or ""."""
    from far_runtime.engines.cache.compatibility import device_of, incompatibility
    from far_runtime.engines.cache.store import EngineCache
    from far_runtime.machine.gpu import find_gpu

    cached = EngineCache(bundle).entries()
    gpu = find_gpu() if cached else None
    return [
        {
            "name": engine.name,
            "path": str(engine.path),
            "library": engine.library,
            "version": engine.facts.get("version", ""),
            "precision": engine.facts.get("precision", ""),
            "device": device_of(engine),
            "flags": engine.facts.get("flags", {}),
            "bytes": engine.size,
            "created": engine.created,
            "seconds": engine.seconds,
            "notes": dict(engine.notes),
            "misfit": incompatibility(engine, bundle, gpu),
        }
        for engine in cached
    ]


def _show(facts: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
    size = sum(record["bytes"] for record in facts["files"].values())
    model = facts["model"]
    console.print(f"{facts['path']}: {facts['system']} bundle {facts['id']}, {facts['precision']}, {size / 1e6:.1f} MB")
    console.print(", ".join(_model_facts(model)))
    for part, source in facts["source"].items():
        said = ", ".join(f"{key} {value}" for key, value in source.items()) if isinstance(source, dict) else source
        console.print(f"{part}: {said}")
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


def _model_facts(model: dict[str, Any]) -> list[str]:
    """What is said of the network, of that which its system has."""
    facts = [] if "masked" not in model else ["masked" if model["masked"] else "unmasked"]
    facts += [f"{model['grid']} x {model['grid']} x {model['channels']} latents", f"{model['image_size']} pixels"]
    facts.append("draws from text" if model.get("condition") == "text" else f"{model['classes']} classes")
    return facts + ([f"predicts {model['prediction']}"] if "prediction" in model else [])


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
    """GFLOP of a row, in the sizes of the graph's axes: "1.2 + 0.03 count"."""
    return " + ".join(f"{_number(value / 1e9)} {term}".strip() for term, value in flops.items() if value)


def _number(value: float) -> str:
    return f"{value:,.2f}" if value >= 1 else f"{value:.3g}"


def _tensor(spec: dict[str, Any]) -> str:
    return f"{spec['name']} {spec['dtype']} [{', '.join(map(str, spec['shape']))}]"


def _schedule_table(facts: dict[str, Any]) -> Table:
    rows = facts["schedule"]
    fixed = ("kind", "number", "inner", "guidance", "constants", "graph", "gflop")
    own = [name for name in rows[0] if name not in fixed]
    columns = {rows[0]["kind"]: "right", "diffusion_steps": "right", "guidance": "right"}
    table = _table("Default schedule", **columns, **dict.fromkeys(own, "right"), GFLOP="right", graph="left")
    for row in rows:
        table.add_row(
            str(row["number"]), str(row["inner"]), f"{row['guidance']:.3g}", *(f"{row[name]:.4g}" for name in own),
            _number(row["gflop"]), row["graph"],
        )  # fmt: skip
    return table


def _preset_table(facts: dict[str, Any]) -> Table:
    table = _table("Presets", preset="left", GFLOP="right", distance="right", settings="left")
    for preset in facts["presets"]:
        ratio = preset["measured"].get("ratio")
        said = "1" if preset["name"] == "official" else "not tuned" if ratio is None else f"{ratio:.3f}"
        shown = ", ".join(
            f"{name} {','.join(map(str, value)) if isinstance(value, list) else value}"
            for name, value in preset["settings"].items()
            if value is not None
        )
        table.add_row(preset["name"], _number(preset["gflop"]), said, shown)
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
    """Time since then, in its largest unit."""
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
