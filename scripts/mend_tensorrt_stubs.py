"""Write tensorrt-stubs where mypy can read them: python scripts/mend_tensorrt_stubs.py FOLDER

The stubs of 10.13 have arguments called `in` and one without a default behind those with one, which is no Python, and
they lie in packages that do not say that they have types. FOLDER gets tensorrt/__init__.pyi, of all that mypy needs.
Without the stubs it gets nothing, and mypy takes tensorrt for untyped.
"""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path

UNREADABLE = ((r"\bin: ", "in_: "), (r"channel_axis: int\)", "channel_axis: int = ...)"))


def mend(folder: Path) -> Path | None:
    """The file that was written, if the stubs are installed."""
    spec = find_spec("tensorrt_bindings")
    found = [Path(place) / "tensorrt.pyi" for place in (spec.submodule_search_locations or [])] if spec else []
    if not found or not found[0].is_file():
        return None
    text = found[0].read_text(encoding="utf-8")
    for pattern, instead in UNREADABLE:
        text = re.sub(pattern, instead, text)
    target = folder / "tensorrt" / "__init__.pyi"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("# mypy: ignore-errors\n" + text, encoding="utf-8")
    return target


if __name__ == "__main__":
    print(mend(Path(sys.argv[1])) or "tensorrt-stubs is not installed")
