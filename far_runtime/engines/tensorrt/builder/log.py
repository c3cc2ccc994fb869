"""What TensorRT's builder says of an engine in its log."""

from __future__ import annotations

import re
from collections.abc import Iterable

FIGURES = {
    "activation": re.compile(r"Total Activation Memory: (\d+) bytes"),
    "weights": re.compile(r"Total Weights Memory: (\d+) bytes"),
    "scratch": re.compile(r"Max Scratch Memory: (\d+) bytes"),
}
"""Bytes on the GPU, by name; TensorRT 10 and 11 and TensorRT-RTX word them alike."""

REFUSED = re.compile(r"(?:\[E\]|Error Code \d+:)\s*(.+)")


def memory_figures(lines: Iterable[str]) -> dict[str, int]:
    """Bytes of the finished engine by name, the last word on each; absent where the log does not say."""
    figures: dict[str, int] = {}
    for line in lines:
        for name, pattern in FIGURES.items():
            found = pattern.search(line)
            if found:
                figures[name] = int(found[1])
    return figures


def errors(lines: Iterable[str]) -> list[str]:
    """The errors in a log, in order and once each."""
    found = (match[1].strip() for match in map(REFUSED.search, lines) if match)
    return list(dict.fromkeys(text for text in found if text and not text.startswith("-")))
