"""Write a copy of tensorrt-stubs that mypy can read: python scripts/mend_tensorrt_stubs.py FOLDER

The stubs of TensorRT 10.13 are not valid Python: they have arguments called `in`, and one without a default after those
with one. Their packages have no py.typed either. The script writes FOLDER/tensorrt/__init__.pyi. Without the stubs it
writes nothing, and mypy treats tensorrt as untyped.
"""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path

UNREADABLE = ((r"\bin: ", "in_: "), (r"channel_axis: int\)", "channel_axis: int = ...)"))


def mend(folder: Path) -> Path | None:
    """Write the file and return its path; None if the stubs are not installed."""
    spec = find_spec("tensorrt_bindings")
    stubs = [Path(place) / "tensorrt.pyi" for place in (spec.submodule_search_locations or [])] if spec else []
    if not stubs or not stubs[0].is_file():
        return None
    text = stubs[0].read_text(encoding="utf-8")
    for pattern, instead in UNREADABLE:
        text = re.sub(pattern, instead, text)
    target = folder / "tensorrt" / "__init__.pyi"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("# mypy: ignore-errors\n" + text, encoding="utf-8")
    return target


if __name__ == "__main__":
    print(mend(Path(sys.argv[1])) or "tensorrt-stubs is not installed")
