"""Drawing shards on Ray: Ray Data hands them to workers, each with an engine of its own, and their files come back."""

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
from far_runtime.errors import FarError
from far_runtime.machine.ray_cluster import WorkerResources, cluster
from far_runtime.pipeline import Pipeline
from far_runtime.sample.draw import Made, draw_shard, engine_of
from far_runtime.sample.plan import Plan, Shard

TRIES = 4
"""Workers that may die of one shard before the run is given up."""


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker needs to draw. bundle: a folder, the same on every machine, whose content has the id `id`. engine:
    its name; None: the best one of the worker's machine. drawn_by: the engine of the pictures that are there already,
    if only that one may go on."""

    plan: Plan
    bundle: Path
    id: str
    engine: str | None
    options: EngineOptions
    check: bool = True
    drawn_by: dict[str, Any] | None = None


class Tries:
    """Counts how often each shard was begun; one for all workers."""

    def __init__(self) -> None:
        self._begun: Counter[int] = Counter()

    def begin(self, number: int) -> int:
        """Which try this is, from 1."""
        self._begun[number] += 1
        return self._begun[number]


class Worker:
    """Draws the shards that it is given, with one engine, which it opens at the first. tries: handle of a `Tries`."""

    def __init__(self, setting: WorkerConfig, tries: Any) -> None:
        self._setting, self._tries = setting, tries
        self._pipeline: Pipeline | None = None

    def __call__(self, rows: Any) -> Any:
        """rows: an Arrow table of number, first, count, one row a shard. Returns their files (or, in place of one, the
        error, where it is one to tell the user) as number, data, note (JSON)."""
        import pyarrow

        numbers, files, notes = [], [], []
        for row in rows.to_pylist():
            shard = Shard(row["number"], row["first"], row["count"])
            try:
                self._count(shard)
                made = draw_shard(self._open(), self._setting.plan, shard)
                file, note = made.data, {"engine": made.engine, "warnings": made.warnings}
            except FarError as error:
                file, note = b"", {"error": str(error)}
            numbers.append(shard.number)
            files.append(file)
            notes.append(json.dumps(note))
        kinds = {"number": pyarrow.int64(), "data": pyarrow.large_binary(), "note": pyarrow.string()}
        return pyarrow.table([numbers, files, notes], schema=pyarrow.schema(list(kinds.items())))

    def _count(self, shard: Shard) -> None:
        import ray

        number = ray.get(self._tries.begin.remote(shard.number))
        if number > TRIES:
            raise FarError(
                f"shard {shard.number}: {TRIES} workers died drawing it; try far generate with its engine, and fewer "
                "--workers or a smaller --batch-size if memory is short"
            )

    def _open(self) -> Pipeline:
        if self._pipeline is None:
            setting = self._setting
            bundle = open_bundle(setting.bundle, check=setting.check)
            if bundle.manifest.id != setting.id:
                raise FarError(
                    f"{setting.bundle}: is another bundle on {_host()}; copy it there from the machine that far sample "
                    "is called on"
                )
            self._pipeline = Pipeline.over(bundle, setting.engine, setting.options)
            engine = engine_of(self._pipeline)
            if setting.drawn_by not in (None, engine):
                raise FarError(
                    f"{_host()} would draw with {engine['engine']} {engine['engine_version']} ({engine['threads']} "
                    f"threads), the pictures that are there are by {setting.drawn_by}; use --engine, or --mixed"
                )
        return self._pipeline


def drawn_on_ray(
    setting: WorkerConfig, shards: Sequence[Shard], workers: int, each: WorkerResources, address: str | None
) -> Generator[Made, None, None]:
    """The files of shards as they are finished, drawn by so many workers on the cluster at `address`, or one of this
    machine's own. A worker that dies is replaced, and its shard drawn again. FarError for what a worker cannot do."""
    if not shards:
        return
    count = min(workers, len(shards))
    with cluster(address, count, each) as ray:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        by_number = {shard.number: shard for shard in shards}
        rows = ray.data.from_items([asdict(shard) for shard in shards], override_num_blocks=len(shards))
        files = rows.map_batches(
            Worker,
            batch_size=1,
            batch_format="pyarrow",
            fn_constructor_args=(setting, ray.remote(num_cpus=0)(Tries).remote()),
            compute=ray.data.ActorPoolStrategy(size=count, max_tasks_in_flight_per_actor=1),
            num_cpus=each.cpus,
            num_gpus=each.gpus,
            resources=dict(each.resources),
        )
        try:
            for batch in files.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
                (row,) = batch.to_pylist()
                note = json.loads(row["note"])
                if "error" in note:
                    raise FarError(note["error"])
                yield Made(by_number[row["number"]], row["data"], note["engine"], tuple(note["warnings"]))
        except ray.exceptions.RayError as error:
            reason = str(error).strip().split("\n")[-1]
            raise FarError(
                f"the workers cannot go on ({reason}); every node needs this far-deploy with its extra ray, and room: "
                "see the logs in /tmp/ray/session_latest/logs"
            ) from error


def _host() -> str:
    return platform.node()
