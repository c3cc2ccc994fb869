"""Batches that are fetched while the one before is computed with."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from torch import Tensor


class Prefetcher:
    """Batches in the order of their use, each fetched by a thread ahead of time. As a context it ends the thread."""

    def __init__(self, fetch: Callable[..., tuple[Tensor, ...]]) -> None:
        self._fetch, self._pool = fetch, ThreadPoolExecutor(1, "ahead")
        self._next: tuple[tuple[Any, ...], Future[tuple[Tensor, ...]]] | None = None

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def take(self, wanted: tuple[Any, ...], following: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """The batch of the arguments `wanted`; the one that is likely to follow is begun."""
        begun, future = self._next or (None, None)
        self._next = (following, self._pool.submit(self._fetch, *following))
        return future.result() if future is not None and begun == wanted else self._fetch(*wanted)
