"""Drawing shards on Ray: Ray Data hands them to workers, each with its own engine, and their files come back."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from far_runtime.bundle import open_bundle
from far_runtime.engines.base import EngineOptions
from far_runtime.errors import FarError, Message, SettingName
from far_runtime.machine.ray_cluster import WorkerResources, cluster
from far_runtime.pipeline import Pipeline
from far_runtime.sample.draw import DrawnShard, draw_shard, engine_facts
from far_runtime.sample.run import SampleRun, Shard

MAX_ATTEMPTS = 4
"""Workers that may die while they draw the same shard before the run ends."""


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker needs to draw."""

    run: SampleRun
    """The run that its shards belong to."""

    bundle: Path
    """The bundle's folder, the same path on every machine."""

    bundle_id: str
    """The id that the bundle has to have there."""

    engine: str | None
    """Name of the engine; None for the best one of the worker's machine."""

    options: EngineOptions
    """How the engine runs."""

    check: bool = True
    """Whether the bundle is compared with its checksums first."""

    expected_engine: dict[str, Any] | None = None
    """The engine of the shards that exist already, if the others have to be drawn by the same."""


class AttemptCounter:
    """Counts how often each shard was begun; one actor for all workers."""

    def __init__(self) -> None:
        self._attempts: Counter[int] = Counter()

    def begin(self, number: int) -> int:
        """Count an attempt at a shard; returns how many there were."""
        self._attempts[number] += 1
        return self._attempts[number]


class Worker:
    """Draws shards with one engine, which it opens at the first shard; attempts: handle of an `AttemptCounter`."""

    def __init__(self, config: WorkerConfig, attempts: Any) -> None:
        self._config, self._attempts = config, attempts
        self._pipeline: Pipeline | None = None

    def __call__(self, rows: Any) -> Any:
        """Draw the shards of an Arrow table with the columns number, first and count.

        Returns a table with the columns number, data (the file; empty after a FarError) and note (JSON with engine and
        warnings, or with the error).
        """
        import pyarrow

        numbers, files, notes = [], [], []
        for row in rows.to_pylist():
            shard = Shard(row["number"], row["first"], row["count"])
            try:
                self._count_attempt(shard)
                drawn = draw_shard(self._open(), self._config.run, shard)
                warnings = [Message(text).to_json() for text in drawn.warnings]
                file, note = drawn.data, {"engine": drawn.engine, "warnings": warnings}
            except FarError as error:
                file, note = b"", {"error": error.message.to_json()}
            numbers.append(shard.number)
            files.append(file)
            notes.append(json.dumps(note))
        columns = {"number": pyarrow.int64(), "data": pyarrow.large_binary(), "note": pyarrow.string()}
        return pyarrow.table([numbers, files, notes], schema=pyarrow.schema(list(columns.items())))

    def _count_attempt(self, shard: Shard) -> None:
        import ray

        if ray.get(self._attempts.begin.remote(shard.number)) > MAX_ATTEMPTS:
            raise FarError(
                f"shard {shard.number}: {MAX_ATTEMPTS} workers died drawing it; try far generate with its engine, and "
                "fewer ",
                SettingName("workers"),
                " or a smaller ",
                SettingName("batch_size"),
                " if memory is short",
            )

    def _open(self) -> Pipeline:
        if self._pipeline is None:
            config = self._config
            bundle = open_bundle(config.bundle, check=config.check)
            if bundle.manifest.id != config.bundle_id:
                raise FarError(
                    f"{config.bundle}: is another bundle on {platform.node()}; copy it there from the machine that far "
                    "sample is called on"
                )
            self._pipeline = Pipeline.over(bundle, config.engine, config.options)
            engine = engine_facts(self._pipeline)
            if config.expected_engine not in (None, engine):
                raise FarError(
                    f"{platform.node()} would draw with {engine['engine']} {engine['engine_version']} "
                    f"({engine['threads']} threads), the existing shards are drawn by {config.expected_engine}; use ",
                    SettingName("engine"),
                    ", or ",
                    SettingName("mixed"),
                )
        return self._pipeline


def draw_on_ray(
    config: WorkerConfig, shards: Sequence[Shard], workers: int, resources: WorkerResources, address: str | None
) -> Generator[DrawnShard, None, None]:
    """Draw shards with several workers and yield each as it is finished.

    A worker that dies is replaced, and its shard is drawn again.

    resources: of each worker.
    address: of the cluster, None for RAY_ADDRESS or a new cluster on this machine.
    Raises FarError for what a worker cannot do.
    """
    if not shards:
        return
    workers = min(workers, len(shards))
    with cluster(address, workers, resources) as ray:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        by_number = {shard.number: shard for shard in shards}
        rows = ray.data.from_items([asdict(shard) for shard in shards], override_num_blocks=len(shards))
        files = rows.map_batches(
            Worker,
            batch_size=1,
            batch_format="pyarrow",
            fn_constructor_args=(config, ray.remote(num_cpus=0)(AttemptCounter).remote()),
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
            **resources.actor_options(),
        )
        try:
            for batch in files.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
                (row,) = batch.to_pylist()
                note = json.loads(row["note"])
                if "error" in note:
                    raise FarError(Message.from_json(note["error"]))
                warnings = tuple(Message.from_json(parts) for parts in note["warnings"])
                yield DrawnShard(by_number[row["number"]], row["data"], note["engine"], warnings)
        except ray.exceptions.RayError as error:
            reason = str(error).strip().split("\n")[-1]
            raise FarError(
                f"the workers cannot go on ({reason}); every node needs this far-deploy with its extra ray, and room: "
                "see the logs in /tmp/ray/session_latest/logs"
            ) from error
