"""Who may draw, and how often: API keys and a rate limit."""

from __future__ import annotations

import hashlib
import hmac
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from far_runtime.errors import FarError, SettingName

MIN_KEY_LENGTH = 16
"""Characters of the shortest key that is accepted."""

MAX_BUCKETS = 10_000
"""Clients that the rate limiter remembers before it looks for those that it may forget."""


class ApiKeys:
    """The API keys that a server accepts, of which it keeps the SHA-256 digests."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @classmethod
    def read(cls, path: Path) -> ApiKeys:
        """The keys in a text file, one per line; lines that begin with # are comments.

        Raises FarError for a file that cannot be read, has no key, or has a key that is too short to be safe.
        """
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise FarError(
                f"{path}: cannot be read ({error}); ", SettingName("keys"), " takes a text file with one key per line"
            ) from error
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise FarError(f"{path}: has no key; write one per line, of {MIN_KEY_LENGTH} characters or more")
        if short := [i + 1 for i, key in enumerate(lines) if key in keys and len(key) < MIN_KEY_LENGTH]:
            raise FarError(
                f"{path}: the key in line {short[0]} is too short; expected {MIN_KEY_LENGTH} characters or more"
            )
        return cls(keys)

    def index(self, key: str) -> int | None:
        """The position of a key, or None for an unknown key; takes the same time for every key."""
        digest, position = hashlib.sha256(key.encode()).digest(), None
        for number, known in enumerate(self._digests):
            if hmac.compare_digest(known, digest):
                position = number
        return position


class RateLimiter:
    """A token bucket for each client, which fills evenly and holds one minute's worth of pictures."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._buckets: dict[object, tuple[float, float]] = {}  # what a bucket holds, and when that was so
        self._lock = threading.Lock()

    def acquire(self, client: object, count: int) -> float:
        """Take `count` pictures from a client's bucket and return 0.0.

        If the bucket holds fewer, nothing is taken, and the seconds until it will hold `count` are returned.
        """
        with self._lock:
            now = self._clock()
            level, then = self._buckets.get(client, (float(self.per_minute), now))
            level = min(self.per_minute, level + (now - then) * self.per_minute / 60)
            if level >= count:
                self._buckets[client] = (level - count, now)
                self._forget_full(now)
                return 0.0
            self._buckets[client] = (level, now)
            return (count - level) * 60 / self.per_minute

    def refund(self, client: object, count: int) -> None:
        """Put back pictures that were taken and not drawn."""
        with self._lock:
            level, then = self._buckets.get(client, (float(self.per_minute), self._clock()))
            self._buckets[client] = (min(self.per_minute, level + count), then)

    def _forget_full(self, now: float) -> None:
        """Drop the buckets that are full again, so that many addresses do not fill the memory."""
        if len(self._buckets) > MAX_BUCKETS:
            self._buckets = {client: bucket for client, bucket in self._buckets.items() if now - bucket[1] < 60}
