"""Compare far-deploy with golden cases: results of the official code from named weights and named noise.

    python scripts/check_golden.py CASE_DIR... [--engine torch|onnxruntime|openvino]

Every case is rebuilt from its case.json. The weights are generated from their names and saved as a checkpoint in the
official layout, which the ordinary loader reads. The stages run in torch, or are exported for the other engines, and
the ordinary loop runs with the named noise. Prints one JSON line per case and exits with 1 if any case fails. Arguments
that are files are ignored.
"""

from __future__ import annotations

import json
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from far_runtime.cli.option_names import with_options
from far_runtime.errors import FarError
from golden.continuous import check_far, check_klvae, check_mar
from golden.far_t2i import check_far_t2i
from golden.stage_engine import ENGINES
from golden.var import check_var

STAGE_TOLERANCE = 1e-4
LOOP_TOLERANCE = 1e-3

CHECKS: dict[str, Callable[..., dict[str, float]]] = {
    "far": check_far,
    "far_t2i": check_far_t2i,
    "mar": check_mar,
    "klvae": check_klvae,
    "var": check_var,
}
LOOP_ARRAYS = {"sampled", "latents", "z_every_16th_all_levels"}


def limit_of(system: str, name: str) -> float:
    """The largest relative error of an array; everything of VAR comes from its loop, and its tokens have to agree."""
    if name.startswith("indices_"):
        return 0.0
    return LOOP_TOLERANCE if system == "var" or name in LOOP_ARRAYS else STAGE_TOLERANCE


def check_case(folder: Path, engine_name: str) -> dict[str, Any]:
    """The JSON line of one case."""
    result: dict[str, Any] = {"case": folder.name, "engine": engine_name, "errors": {}, "passed": False}
    try:
        case = json.loads((folder / "case.json").read_text())
        with np.load(folder / "expected.npz", allow_pickle=False) as arrays:
            expected = dict(arrays)
        if case["system"] not in CHECKS:
            raise FarError(f"system {case['system']!r}; known: {', '.join(CHECKS)}")
        with tempfile.TemporaryDirectory() as aside:
            errors = CHECKS[case["system"]](case, expected, engine_name, Path(aside))
    except (FarError, OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        return {
            **result,
            "problem": f"{type(error).__name__}: {with_options(error) if isinstance(error, FarError) else error}",
        }
    limits = {name: limit_of(case["system"], name) for name in errors}
    return {**result, "errors": errors, "passed": all(errors[name] <= limits[name] for name in errors)}


@click.command(help=__doc__)
@click.argument("cases", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option(
    "--engine", type=click.Choice(ENGINES), default="torch", show_default=True, help="Engine that computes the stages."
)
def main(cases: tuple[Path, ...], engine: str) -> None:
    # The shell expands golden/* to the README too.
    folders = [path for path in cases if path.is_dir()]
    if not folders:
        raise click.UsageError("no folder of a case among the arguments")
    passed = True
    for folder in folders:
        result = check_case(folder, engine)
        passed &= result["passed"]
        click.echo(json.dumps(result))
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
