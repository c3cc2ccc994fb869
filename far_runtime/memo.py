"""Memo: arrays that are computed once, within a bound of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

import numpy as np
from numpy.typing import NDArray


class Memo:
    """float32 arrays by key; beyond `limit` bytes, those that were not asked for longest are given up."""

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._kept: OrderedDict[Hashable, NDArray[np.float32]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, make: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
        """The array of a key, made if it is not there. Not to be written to."""
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
            return found
        made = np.array(make())
        made.setflags(write=False)
        if made.nbytes <= self.limit and np.isfinite(made).all():  # what failed once need not fail again
            self._kept[key] = made
            self.size += made.nbytes
        while self.size > self.limit:
            self.size -= self._kept.popitem(last=False)[1].nbytes
        return made
