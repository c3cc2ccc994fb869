"""Who may draw, and how often: API keys and a rate for each."""

from __future__ import annotations

import hashlib
import hmac
import threading
import time
from collections.abc import Callable
from pathlib import Path

from far_runtime.errors import FarError

SHORTEST = 16


class Keys:
    """The keys of a file, one a line; lines that begin with # are comments."""

    def __init__(self, keys: list[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @classmethod
    def read(cls, path: Path) -> Keys:
        """FarError for a file that cannot be read, has none, or one that is too short to be safe."""
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise FarError(f"{path}: cannot be read ({error}); --keys takes a text file with a key a line") from error
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise FarError(f"{path}: has no key; write one a line, of {SHORTEST} characters or more")
        if short := [i + 1 for i, key in enumerate(lines) if key in keys and len(key) < SHORTEST]:
            raise FarError(f"{path}: the key in line {short[0]} is short; expected {SHORTEST} characters or more")
        return cls(keys)

    def which(self, given: str) -> int | None:
        """The number of the key, None for an unknown one; takes the same time for each."""
        digest, found = hashlib.sha256(given.encode()).digest(), None
        for number, known in enumerate(self._digests):
            if hmac.compare_digest(known, digest):
                found = number
        return found


class Rate:
    """So many pictures a minute for each key (or each address, where there are no keys): a bucket that fills evenly and
    holds a minute's worth."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._buckets: dict[object, tuple[float, float]] = {}
        self._lock = threading.Lock()

    def take(self, who: object, count: int) -> float:
        """Take `count` from who's bucket: 0.0; or, where it does not hold that many, the seconds until it will."""
        with self._lock:
            now = self._clock()
            held, then = self._buckets.get(who, (float(self.per_minute), now))
            held = min(self.per_minute, held + (now - then) * self.per_minute / 60)
            if held >= count:
                self._buckets[who] = (held - count, now)
                self._forget(now)
                return 0.0
            self._buckets[who] = (held, now)
            return (count - held) * 60 / self.per_minute

    def give(self, who: object, count: int) -> None:
        """Put back what was taken and not used."""
        with self._lock:
            held, then = self._buckets.get(who, (float(self.per_minute), self._clock()))
            self._buckets[who] = (min(self.per_minute, held + count), then)

    def _forget(self, now: float) -> None:
        """Drop buckets that are full again, so that many addresses do not fill the memory."""
        if len(self._buckets) > 10_000:
            self._buckets = {who: (held, then) for who, (held, then) in self._buckets.items() if now - then < 60}
