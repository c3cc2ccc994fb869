"""Room in a cluster, without one."""

from __future__ import annotations

import pytest

from far_runtime.errors import FarError
from far_runtime.machine.ray_cluster import WorkerResources, _check_capacity

NODES = [{"CPU": 3.0, "GPU": 1.0}, {"CPU": 3.0, "jetson": 1.0}]


@pytest.mark.parametrize(
    ("resources", "capacity"),
    [
        (WorkerResources(), 6),
        (WorkerResources(2), 2),  # not on two nodes at once
        (WorkerResources(0.1), 60),
        (WorkerResources(1, 0.5), 2),
        (WorkerResources(0, 0.4), 2),
        (WorkerResources(1, 1), 1),
        (WorkerResources(1, 0, {"jetson": 0.5}), 2),
    ],
)
def test_as_many_as_fit_are_taken_and_no_more(resources: WorkerResources, capacity: int) -> None:
    _check_capacity(resources, capacity, NODES)
    with pytest.raises(
        FarError, match=f"each: the cluster has room for {capacity}, not for {capacity + 1}; ask for fewer"
    ):
        _check_capacity(resources, capacity + 1, NODES)


def test_two_whole_gpus_are_not_shared_as_one() -> None:
    _check_capacity(WorkerResources(0, 0.4), 4, [{"GPU": 2.0}])
    with pytest.raises(FarError, match=r"0\.4 GPU each: the cluster has room for 4, not for 5"):
        _check_capacity(WorkerResources(0, 0.4), 5, [{"GPU": 2.0}])


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        (WorkerResources(7), "7 CPU each: the cluster has 6 in all"),
        (WorkerResources(1, 2), "2 GPU each"),
        (WorkerResources(1, 0, {"tpu": 1}), "1 tpu each: the cluster has 0 in all"),
    ],
)
def test_what_no_cluster_of_these_nodes_has_is_said(resources: WorkerResources, message: str) -> None:
    with pytest.raises(FarError, match=message):
        _check_capacity(resources, 1, NODES)
