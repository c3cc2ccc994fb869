"""`far sample --ray` on a cluster of two nodes on this machine, each with room for one worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="ray is not installed")
psutil = pytest.importorskip("psutil")
pytestmark = pytest.mark.slow

FAST = ("--engine", "onnxruntime", "--threads", 1, "--shard-size", 4, "--batch-size", 3)
COMMAND = [sys.executable, "-c", "import sys; from far_runtime.cli.main import main; main(sys.argv[1:])", "sample"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster with one CPU on each of two nodes."""
    from ray.cluster_utils import Cluster

    environment = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    os.environ.update(environment)
    node = {"num_cpus": 1, "object_store_memory": 100 << 20}
    ray_cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    ray_cluster.add_node(**node)
    yield ray_cluster.address
    ray_cluster.shutdown()
    for name in environment:
        del os.environ[name]


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*.tar"))}


def workers() -> list[Any]:
    """Processes of the cluster that draw, as Ray calls them."""
    processes = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[0].startswith("ray::MapWorker"):
                processes.append(process)
        except (psutil.Error, IndexError):
            continue
    return processes


def test_one_of_two_workers_is_killed_and_every_seed_is_there_once_with_the_same_pixels(
    far: Any, tiny: Any, cluster: str, tmp_path: Path
) -> None:
    arguments = [str(tiny.bundle), "--count", "100", "--steps", "25", *map(str, FAST)]
    out = tmp_path / "out"
    command = [*COMMAND, *arguments, "-o", str(out), "--ray", "--workers", "2", "--address", cluster]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        while len(workers()) < 2 or len(shards(out)) < 6:
            assert run.poll() is None, run.stderr and run.stderr.read()
            time.sleep(0.02)
        victim = workers()[0]
        os.kill(victim.pid, signal.SIGKILL)
        before = len(shards(out))
        out_text, err_text = run.communicate(timeout=200)
    assert run.returncode == 0, err_text
    assert before < 25
    assert not psutil.pid_exists(victim.pid) or victim.status() == psutil.STATUS_ZOMBIE
    assert "100 pictures in 25 shards, seeds 0 to 99" in out_text
    assert "drew 100 in " in out_text and "by 2 workers" in out_text
    alone = far("sample", *arguments, "-o", "alone")
    assert alone.code == 0, alone.err
    assert shards(out) == shards(tmp_path / "alone")  # of which the names hold every seed once: test_sample.py
    assert (out / "sample.json").read_bytes() == (tmp_path / "alone" / "sample.json").read_bytes()


def test_workers_of_another_engine_are_refused(far: Any, tiny: Any, cluster: str, tmp_path: Path) -> None:
    arguments = ["sample", tiny.bundle, "--count", 8, *FAST, "--ray", "--address", cluster]
    assert far("sample", tiny.bundle, "--count", 8, *FAST, "-o", "out").code == 0
    before = shards(tmp_path / "out")
    (tmp_path / "out" / "shard-00001.tar").unlink()
    (tmp_path / "out" / "engine.json").write_text('{"engine": "tensorrt", "engine_version": "10.3", "threads": null}')
    result = far(*arguments, "-o", "out")
    assert result.code == 2, result.err
    assert "would draw with onnxruntime:cpu" in result.err and "use --engine, or --mixed" in result.err
    assert shards(tmp_path / "out") == {"shard-00000.tar": before["shard-00000.tar"]}


def test_a_shard_that_kills_its_workers_ends_the_run(tiny: Any, cluster: str) -> None:
    import pyarrow

    from far_runtime.conditioning.subjects import Subject
    from far_runtime.engines.base import EngineOptions
    from far_runtime.sample.on_ray import MAX_ATTEMPTS, AttemptCounter, Worker, WorkerConfig
    from far_runtime.sample.run import SampleRun

    ray.init(cluster, log_to_driver=False)
    try:
        attempts = ray.remote(num_cpus=0)(AttemptCounter).remote()
        for _ in range(MAX_ATTEMPTS):
            ray.get(attempts.begin.remote(1))
        config = WorkerConfig(SampleRun([Subject(0)], {}, 4), tiny.bundle, "", "onnxruntime", EngineOptions())
        answer = Worker(config, attempts)(pyarrow.table({"number": [1], "first": [0], "count": [4]}))
    finally:
        ray.shutdown()
    (row,) = answer.to_pylist()
    assert row["data"] == b""
    assert f"shard 1: {MAX_ATTEMPTS} workers died drawing it" in row["note"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus-per-worker", "0.5"], "0.5 GPU each: the cluster has 0 in all"),
        (["--resource", "jetson=1"], "1 jetson each"),
        (["--address", "127.0.0.1:9"], "no Ray cluster answers at 127.0.0.1:9"),
    ],
)
def test_bad_options_are_an_error_in_one_line(
    far: Any, tiny: Any, cluster: str, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    result = far("sample", tiny.bundle, "--count", 10, "-o", "out", "--ray", *arguments)
    assert (result.code, result.out) == (2, ""), result.err
    assert message in result.err
