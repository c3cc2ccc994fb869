"""A lock that is taken if it is free."""

from __future__ import annotations

from pathlib import Path

import pytest

from far_runtime.storage.lock import held, held_if_free


def test_a_lock_is_taken_if_it_is_free(tmp_path: Path) -> None:
    with held_if_free(tmp_path / "lock") as free:
        assert free
        with held_if_free(tmp_path / "lock") as again:
            assert not again
    with held(tmp_path / "lock"), held_if_free(tmp_path / "lock") as free:
        assert not free


@pytest.mark.parametrize("taken", [False, True])
def test_errors_of_the_block_are_its_own(tmp_path: Path, taken: bool) -> None:
    outer = held(tmp_path / "lock") if taken else held(tmp_path / "other")
    with outer, pytest.raises(BlockingIOError, match="of the block"), held_if_free(tmp_path / "lock") as free:
        assert free is not taken
        raise BlockingIOError("of the block")
    assert list(tmp_path.iterdir()) == []
