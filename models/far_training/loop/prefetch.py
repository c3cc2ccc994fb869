"""Batches that are fetched while the batch before is computed with."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

Batch = tuple[Tensor, ...]


class Prefetcher:
    """Fetches batches in a thread, one ahead of its use; as a context it ends the thread."""

    def __init__(self, fetch: Callable[..., Batch]) -> None:
        self._fetch, self._pool = fetch, ThreadPoolExecutor(1, "prefetch")
        self._next: tuple[tuple[Any, ...], Future[Batch]] | None = None

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def get(self, arguments: tuple[Any, ...], next_arguments: tuple[Any, ...]) -> Batch:
        """fetch(*arguments), and start on the batch that is likely to be asked for next."""
        fetched_arguments, future = self._next or (None, None)
        self._next = (next_arguments, self._pool.submit(self._fetch, *next_arguments))
        return future.result() if future is not None and fetched_arguments == arguments else self._fetch(*arguments)
