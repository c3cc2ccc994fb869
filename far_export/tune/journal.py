"""What was judged, line by line in a file, so that a search goes on where it was ended."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from far_export.tune.search import Judged, Settings
from far_runtime.errors import FarError


class Journal:
    """A file of JSON lines, one a judged candidate. A line that was cut off, or is of other facts, is passed over."""

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        """facts: what a judgement depends on beside the settings. FarError where the file cannot be read."""
        self._path = path
        self._facts = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        self._found: dict[str, Judged] = {}
        self._whole = True
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise FarError(f"{path}: cannot be read ({error}); name another journal with --journal") from error
        self._whole = text.endswith("\n") or not text
        for line in text.splitlines():
            self._take(line)

    def __len__(self) -> int:
        return len(self._found)

    def find(self, settings: Settings, which: str = "") -> Judged | None:
        """What was found of these settings before. which: of which look."""
        return self._found.get(_key(settings, which))

    def keep(self, judged: Judged, which: str = "") -> None:
        """Append a line; FarError where that fails."""
        line = json.dumps({"facts": self._facts, "which": which, **asdict(judged)}, sort_keys=True)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(("" if self._whole else "\n") + line + "\n")
        except OSError as error:
            raise FarError(
                f"{self._path}: cannot be written ({error.strerror or error}); name another journal with --journal"
            ) from error
        self._whole = True
        self._found[_key(judged.settings, which)] = judged

    def _take(self, line: str) -> None:
        try:
            entry = json.loads(line)
            if entry.pop("facts") == self._facts:
                which = str(entry.pop("which"))
                judged = Judged(**entry)
                self._found[_key(judged.settings, which)] = judged
        except (ValueError, KeyError, TypeError, AttributeError):
            return


def _key(settings: Settings, which: str) -> str:
    return which + json.dumps(settings, sort_keys=True)
