"""Scores of candidates, line by line in a file, so that a search goes on where it was ended."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from far_export.tune.search import Candidate, Settings
from far_runtime.errors import FarError
from far_runtime.storage.run_record import digest_of


class Journal:
    """A file of JSON lines, one for each score; a line that was cut off, or belongs to other facts, is ignored."""

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        """facts: what a score depends on beside the settings. FarError where the file cannot be read."""
        self._path = path
        self._facts = digest_of(facts)
        self._scores: dict[str, Candidate] = {}
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise FarError(f"{path}: cannot be read ({error}); name another journal with --journal") from error
        self._ends_with_newline = text.endswith("\n") or not text
        for line in text.splitlines():
            self._take(line)

    def __len__(self) -> int:
        return len(self._scores)

    def find(self, settings: Settings, which: str = "") -> Candidate | None:
        """The score of these settings, None where there is none. which: "" for the first score, or a later one's
        name."""
        return self._scores.get(_key(settings, which))

    def keep(self, candidate: Candidate, which: str = "") -> None:
        """Append a score; FarError where that fails."""
        line = json.dumps({"facts": self._facts, "which": which, **asdict(candidate)}, sort_keys=True)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(("" if self._ends_with_newline else "\n") + line + "\n")
        except OSError as error:
            raise FarError(
                f"{self._path}: cannot be written ({error.strerror or error}); name another journal with --journal"
            ) from error
        self._ends_with_newline = True
        self._scores[_key(candidate.settings, which)] = candidate

    def _take(self, line: str) -> None:
        try:
            entry = json.loads(line)
            if entry.pop("facts") == self._facts:
                which = str(entry.pop("which"))
                candidate = Candidate(**entry)
                self._scores[_key(candidate.settings, which)] = candidate
        except (ValueError, KeyError, TypeError, AttributeError):
            return


def _key(settings: Settings, which: str) -> str:
    return which + json.dumps(settings, sort_keys=True)
