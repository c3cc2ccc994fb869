"""Draws pictures from a FAR bundle: numpy and one engine library, no torch."""

from __future__ import annotations

__version__ = "0.1.0"
