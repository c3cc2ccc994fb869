"""Memory figures and errors in the log of TensorRT's builder."""

from __future__ import annotations

import re
from collections.abc import Iterable

FIGURES = {
    "activation": re.compile(r"Total Activation Memory: (\d+) bytes"),
    "weights": re.compile(r"Total Weights Memory: (\d+) bytes"),
    "scratch": re.compile(r"Max Scratch Memory: (\d+) bytes"),
}
"""Lines that give bytes on the GPU; TensorRT 10, TensorRT 11 and TensorRT-RTX use the same words."""

ERROR = re.compile(r"(?:\[E\]|Error Code \d+:)\s*(.+)")


def memory_figures(lines: Iterable[str]) -> dict[str, int]:
    """Bytes of the finished engine by name, from the last line on each; figures that the log lacks are absent."""
    figures: dict[str, int] = {}
    for line in lines:
        for name, pattern in FIGURES.items():
            if match := pattern.search(line):
                figures[name] = int(match[1])
    return figures


def errors(lines: Iterable[str]) -> list[str]:
    """The errors in a log, in order and once each."""
    texts = (match[1].strip() for match in map(ERROR.search, lines) if match)
    return list(dict.fromkeys(text for text in texts if text and not text.startswith("-")))
