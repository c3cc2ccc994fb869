"""far bench: interleaved engines, each in its own process; results that add up; failures that are named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

import far_runtime.bench.engine_specs
import far_runtime.bench.matmul_rate
import far_runtime.bench.runner
from far_runtime.bench.engine_benchmark import EngineBenchmark, OpenedEngine, PeakMemory, StageTimes
from far_runtime.bench.engine_specs import CPU, CheckpointFiles, EngineSpec, compute_precision, device_of
from far_runtime.bench.matmul_rate import MatmulRate
from far_runtime.bench.results import BenchmarkResult, summarize
from far_runtime.bench.runner import BatchRuns, BenchmarkRuns, EngineRuns, RunLimit, run_benchmark
from far_runtime.bench.table import at_one_batch
from far_runtime.bench.worker_process import WorkerError
from far_runtime.bundle import open_bundle
from far_runtime.conditioning.subjects import Subject
from far_runtime.engines.base import EngineOptions
from far_runtime.engines.timed import COPIES, TimedEngine
from far_runtime.errors import FarError
from far_runtime.sampling.flops import picture_cost
from far_runtime.sampling.settings import plan_of, resolve_settings

if TYPE_CHECKING:
    from conftest import Tiny

HERE = Path(__file__).parent
FLOPS = {"transformer": 6e9, "denoise": 3e9, "decode": 1e9}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices, no rests, and the failing engine of this folder as the only one that is added."""
    monkeypatch.setattr(far_runtime.bench.matmul_rate, "SIZE", 64)
    monkeypatch.setattr(far_runtime.bench.runner, "REST", 0)
    monkeypatch.setattr(far_runtime.bench.engine_specs, "engine_plugins", lambda: {"fake": "bench_fake"})
    monkeypatch.syspath_prepend(str(HERE))


# Results


def engine_runs(name: str, seconds: Mapping[int, list[float]], failure: str = "") -> EngineRuns:
    """An engine that took `seconds` by batch size in the rounds: half in the transformer, a quarter in two denoise
    calls, an eighth in decode, a sixteenth in copies."""
    batches = {
        batch: BatchRuns(
            first=2 * rounds[0],
            whole=dict(enumerate(rounds)),
            staged=[
                StageTimes(s, {COPIES: [s / 16], "transformer": [s / 2], "denoise": [s / 8, s / 8], "decode": [s / 8]})
                for s in rounds
            ],
        )
        for batch, rounds in seconds.items()
    }
    opened = OpenedEngine(name, "1", 0.5, 10)
    return EngineRuns(name, opened, "fp32", "", False, batches, PeakMemory(30, None), failure)


def results(*engines: EngineRuns, matmul: Any = None) -> BenchmarkResult:
    rates = {(CPU, "fp32"): {"numpy": [20e9, 30e9, 25e9], "torch": [5e9]}} if matmul is None else matmul
    return summarize(BenchmarkRuns(list(engines), rates, 64, 3, 1.0, []), FLOPS)


def test_results_of_known_times() -> None:
    benchmark = results(
        engine_runs("a", {1: [1.0, 2.0, 4.0], 2: [2.0, 2.0, 2.0]}), engine_runs("b", {1: [0.5, 2.0, 1.0]})
    )
    a, b = benchmark.engines
    one, two = a.batches
    assert (one.p50_s, one.p95_s, one.pictures_per_s) == (2.0, pytest.approx(3.8), 0.5)
    assert two.pictures_per_s == 1.0 and two.gflop == 20.0
    assert (one.gflop, one.gflop_per_s) == (10.0, 5.0)
    assert [(rate.gflop_per_s, rate.method) for rate in benchmark.rates] == [(30.0, "numpy")]
    assert one.rate_share == pytest.approx(5 / 30)
    assert (a.load_s, a.peak_bytes, a.before_bytes) == (0.5, 30, 10)  # the first took no longer than the median
    ratio = b.batches[0].ratio
    assert ratio is not None and (ratio.median, ratio.low, ratio.high) == (
        2.0,
        1.0,
        4.0,
    )  # round by round, not of medians
    assert one.ratio is not None and one.ratio.low == one.ratio.high == 1.0


def test_stages_and_their_shares_add_up() -> None:
    (engine,) = results(engine_runs("a", {2: [1.0, 2.0, 4.0]})).engines
    stages = engine.batches[0].stages
    assert [stage.stage for stage in stages] == ["transformer", "denoise", "decode", COPIES, "host"]
    assert sum(stage.time_share for stage in stages) == pytest.approx(1)
    assert sum(stage.seconds for stage in stages) == pytest.approx(2.0)
    assert sum(stage.gflop or 0 for stage in stages) == pytest.approx(engine.batches[0].gflop)
    denoise = stages[1]
    assert (denoise.calls, denoise.count, denoise.p50_s, denoise.seconds) == (2, 6, 0.25, 0.5)
    assert (denoise.gflop_per_s, denoise.rate_share) == (12.0, pytest.approx(12 / 30))
    assert stages[3].gflop_per_s is None


def test_no_share_without_a_matrix_product() -> None:
    benchmark = results(engine_runs("a", {1: [1.0]}), matmul={(CPU, "fp32"): {}})
    assert benchmark.rates == () and benchmark.engines[0].batches[0].rate_share is None
    assert benchmark.engines[0].batches[0].gflop_per_s == 10.0


def test_ratios_refer_to_the_first_engine_that_ran() -> None:
    benchmark = results(
        engine_runs("a", {1: [9.0]}, "batch 1: gone"), engine_runs("b", {1: [2.0]}), engine_runs("c", {1: [1.0]})
    )
    assert benchmark.baseline == "b" and benchmark.failures == ["engine a: batch 1: gone"]
    assert benchmark.engines[2].batches[0].ratio is not None and benchmark.engines[2].batches[0].ratio.median == 2.0


def test_stages_are_shown_at_a_batch_size_that_most_engines_have() -> None:
    a, b, c = ({1: [1.0], 2: [1.0]}, {1: [1.0], 2: [1.0], 4: [1.0]}, {1: [1.0], 2: [1.0]})
    benchmark = results(engine_runs("a", a), engine_runs("b", b), engine_runs("c", c))
    assert [(engine.engine, batch.batch) for engine, batch in at_one_batch(benchmark)] == [("a", 2), ("b", 2), ("c", 2)]
    assert at_one_batch(results(engine_runs("a", {}))) == []


def test_precisions_are_those_computed_in() -> None:
    assert compute_precision("onnxruntime:cpu", "fp32") == ("fp32", "")
    assert compute_precision("onnxruntime:cpu", "fp16") == ("fp32", "fp16 graphs are computed in fp32 on the CPU")
    assert compute_precision("openvino:cpu:bf16", "fp32") == ("bf16", "")
    assert compute_precision("openvino:cpu:bf16", "int8") == ("int8", "")
    assert compute_precision("tensorrt", "fp16") == ("fp16", "")
    assert compute_precision("openvino:gpu:f16", "fp32") == ("fp16", "")
    assert compute_precision("openvino:cpu:f16", "fp32") == ("fp32", "")
    assert compute_precision("torch", "int8", plugin=True) == ("fp32", "runs the checkpoint in fp32")
    assert [device_of(name) for name in ("onnxruntime:cuda", "openvino:gpu:f16", "openvino", "tensorrt-rtx")] == [
        "gpu", "gpu", "cpu", "gpu"
    ]  # fmt: skip


def test_a_stage_is_timed_until_it_is_done() -> None:
    now = [0.0]

    def takes(seconds: float, result: Any = None) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            now[0] += seconds
            return result

        return call

    engine: Any = SimpleNamespace(
        name="n", version="1", put=takes(1), get=takes(2), run=takes(4, {}), synchronize=takes(8), close=takes(0)
    )
    timed = TimedEngine(engine, lambda: now[0])
    for _ in range(2):
        timed.run("denoise", {})
    timed.get(timed.put(np.zeros(1)))
    assert timed.seconds == {"denoise": [12.0, 12.0], COPIES: [9.0, 10.0]}


# Rounds


class FakeWorker:
    """In place of a process: a clock that every call moves on, and a log of the calls of all engines."""

    log: list[str]
    now: float

    def __init__(self, target: Any, environment: Any = None) -> None:
        self.target = target
        self.dead = False

    def call(self, method: str, *args: Any) -> Any:
        if isinstance(self.target, MatmulRate):
            return {target: ["numpy"] for target in self.target.targets} if method == "open" else {}
        name = self.target.engine.name
        if method == "open":
            return OpenedEngine(name, "1", 0.0, None)
        if method == "peak_memory":
            return PeakMemory()
        type(self).log.append(f"{name}{args[0]}{'' if method == 'time_batch' else '/'}")
        type(self).now += 1.0
        if name == "small" and args[0] > 1:
            raise WorkerError("out of memory", out_of_memory=True, process_ended=True)
        if name == "late" and len(type(self).log) > 8:
            raise WorkerError("gone")
        return 1.0 if method == "time_batch" else StageTimes(1.0, {})

    def close(self) -> None:
        self.dead = True


def in_turn(length: RunLimit, *names: str, batches: tuple[int, ...] = (1, 2)) -> tuple[BenchmarkRuns, str]:
    """What was measured of fake engines, and the calls in their order (/: by stages)."""
    worker: Any = type("Worker", (FakeWorker,), {"log": [], "now": 0.0})
    benchmarks = [
        EngineBenchmark(Path("b"), EngineSpec(name), EngineOptions(), CheckpointFiles(), (Subject(0),), 0, {})
        for name in names
    ]
    runs = run_benchmark(benchmarks, "fp32", batches, length, MatmulRate, start=worker, clock=lambda: worker.now)
    return runs, " ".join(worker.log)


def test_engines_run_in_turn_within_every_round() -> None:
    runs, log = in_turn(RunLimit(rounds=2), "a", "b", "c")
    one_round = "a1 b1 c1 a1/ b1/ c1/ a2 b2 c2 a2/ b2/ c2/"
    assert log == f"a1 b1 c1 a2 b2 c2 {one_round} {one_round}"  # warm-up first
    assert runs.rounds == 2 and [entry[0] for entry in runs.order] == [0] * 12 + [1] * 12
    assert [f"{engine}{batch}" for _, batch, engine, what in runs.order[:12] if what == "whole"] == [
        "a1", "b1", "c1", "a2", "b2", "c2"
    ]  # fmt: skip


def test_rounds_are_begun_for_so_many_seconds() -> None:
    runs, _ = in_turn(RunLimit(seconds=20.0), "a", batches=(1,))
    assert runs.rounds == 10  # of two seconds each
    runs, _ = in_turn(RunLimit(seconds=0.5), "a", batches=(1,))
    assert runs.rounds == 1


def test_a_batch_without_memory_is_skipped_and_its_engine_comes_back() -> None:
    runs, log = in_turn(RunLimit(rounds=1), "small", "b", batches=(1, 2, 4))
    small, b = runs.engines
    assert {batch: runs_of_batch.skipped for batch, runs_of_batch in small.batches.items()} == {
        1: "", 2: "out of memory", 4: "batch 2 did not fit"
    }  # fmt: skip
    assert small.failure == "" and small.batches[1].whole == {0: 1.0}
    assert all(one.whole for one in b.batches.values())
    assert log.startswith("small1 b1 small2 small1 b2 b4 small1 b1")  # opened and warmed up again


def test_an_engine_that_fails_is_left_out_of_further_rounds() -> None:
    runs, log = in_turn(RunLimit(rounds=3), "late", "b", batches=(1,))
    assert runs.engines[0].failure == "batch 1: gone" and runs.engines[1].failure == ""
    assert len(runs.engines[1].batches[1].whole) == 3
    assert log.endswith("b1 b1/")


# The command


def bench_json(out: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(out)
    return report


def test_two_engines_are_compared(far: Any, tiny: Tiny, tmp_path: Path) -> None:
    result = far(
        "bench", tiny.bundle, "--engine", "onnxruntime", "--engine", "openvino", "--batch", "1,3", "--repeat", 2,
        "--threads", 1, "--json", "bench.json", "--plot", "bench.png",
    )  # fmt: skip
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[-1] == "written: bench.json, bench.png"
    for text in ("Engines", "Pictures", "Stages, batch 3", "onnxruntime", "openvino", "matrix product 64 x 64: fp32"):
        assert text in result.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.png"]  # nothing left aside
    with Image.open(tmp_path / "bench.png") as image:
        pixels = np.asarray(image.convert("L"))
    assert pixels.shape[1] > 1000 and 5 < pixels.std() < 100
    report = bench_json((tmp_path / "bench.json").read_text())
    check_schema(report)
    manifest = open_bundle(tiny.bundle).manifest
    settings = resolve_settings(manifest)
    assert report["settings"] == settings and report["bundle"]["id"] == manifest.id and report["batches"] == [1, 3]
    cost = picture_cost(manifest, plan_of(manifest, settings))
    assert report["gflop"] == pytest.approx({stage: flop / 1e9 for stage, flop in cost.items()})
    steps = plan_of(manifest, settings)
    for engine in report["engines"]:
        assert engine["failure"] == "" and engine["precision"] == "fp32"
        assert engine["peak_bytes"] > engine["before_bytes"] > 0
        for batch in engine["batches"]:
            calls = {stage["stage"]: stage["calls"] for stage in batch["stages"]}
            assert calls["transformer"] == len(steps) and calls["denoise"] == sum(step.substeps for step in steps)
            assert calls["decode"] == 1 and len(batch["seconds"]) == 2
            assert batch["gflop"] == pytest.approx(batch["batch"] * sum(cost.values()) / 1e9)
            assert sum(stage["time_share"] for stage in batch["stages"]) == pytest.approx(1)


@pytest.mark.parametrize("name", ["masked", "mar", "t2i"])
def test_every_system_is_measured_by_its_stages(far: Any, tiny: Tiny, name: str) -> None:
    bundle = getattr(tiny, f"{name}_bundle")
    result = far(
        "bench", bundle, "--batch", 2, "--repeat", 1, "--threads", 1, "--engine", "onnxruntime", "--json", "-", "-q"
    )
    assert (result.code, result.err) == (0, "")
    report = bench_json(result.out)
    assert report["subjects"] and list(report["gflop"])[-1] == "decode"
    (batch,) = report["engines"][0]["batches"]
    assert {stage["stage"] for stage in batch["stages"]} >= {*report["gflop"], COPIES, "host"}  # and place
    assert all(stage["gflop_per_s"] for stage in batch["stages"] if report["gflop"].get(stage["stage"]))


def check_schema(report: dict[str, Any]) -> None:
    """The fields that docs/bench.md lists, and no others."""
    page = (HERE.parents[2] / "docs" / "bench.md").read_text(encoding="utf-8")
    engine, batch = report["engines"][0], report["engines"][0]["batches"][0]
    parts = {"": report, "machine": report["machine"], "rates": report["rates"][0], "engines": engine, "batches": batch}
    parts |= {"stages": batch["stages"][0]}
    documented = {
        line.split("|")[1].strip(" `"): set(line.split("|")[2].replace("`", "").replace(" ", "").split(","))
        for line in page.partition("## JSON")[2].splitlines()
        if line.startswith("| ") and "`" in line
    }
    assert {part: set(fields) for part, fields in parts.items()} == {
        part.removeprefix("top"): fields for part, fields in documented.items()
    }


def test_json_alone_goes_to_standard_output(far: Any, tiny: Tiny) -> None:
    result = far("bench", tiny.bundle, "--batch", 1, "--repeat", 1, "--steps", 1, "--json", "-")
    assert result.code == 0 and "Pictures" in result.err
    report = bench_json(result.out)
    assert len(report["engines"]) == 1
    assert report["settings"]["steps"] == 1
    assert f"engine {report['engines'][0]['engine']}: " in result.err and "--engine chooses another" in result.err


def test_failures_are_named_and_the_others_are_reported(far: Any, tiny: Tiny) -> None:
    engines = ("fake:broken", "fake:memory", "fake:killed", "onnxruntime")
    result = far(
        "bench", tiny.bundle, *(part for name in engines for part in ("--engine", name)), "--batch", "1,2,3",
        "--repeat", 1, "--steps", 1, "--threads", 1, "--json", "bench.json",
    )  # fmt: skip
    assert result.code == 1
    assert result.err == "error: engine fake:broken: batch 2: ArithmeticError: the wheel is off\n"
    assert "fake:memory, batch 3: skipped: out of memory" in result.out
    killed = "fake:killed, batch 3: skipped: its process was ended by SIGKILL, as the system does when memory runs out"
    assert killed in result.out.replace("\n", " ")
    report = bench_json(Path("bench.json").read_text())
    measured = {
        engine["engine"]: [batch["batch"] for batch in engine["batches"] if batch["seconds"]]
        for engine in report["engines"]
    }
    assert measured == {"fake:broken": [], "fake:memory": [1, 2], "fake:killed": [1, 2], "onnxruntime": [1, 2, 3]}
    assert report["engines"][3]["batches"][0]["ratio"]["median"] > 0  # to fake:memory, the first that ran


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--engine", "abacus"), "engine 'abacus': unknown; known: onnxruntime, openvino"),
        (("--engine", "openvino", "--engine", "openvino"), "--engine openvino: given twice"),
        (("--engine", "onnxruntime:abacus"), "unknown provider"),
        (("--engine", "fake:shut"), "engine fake:shut: does not open: ValueError: the door is locked"),
        (("--batch", "1,two"), "expected numbers with commas between them, such as 1,4,8"),
        (("--batch", "0"), "batch sizes are 1 to 4096"),
        (("--batch", "2,2"), "give each batch size once"),
        (("--repeat", 3, "--seconds", 3), "--repeat and --seconds: give one or the other"),
        (("--label", "unicorn"), "unicorn"),
        (("--top-k", 3), "--top-k: a far model has no such setting"),
        (("--plot", "bench.gif"), "a plot is written as PNG or SVG; use --plot bench.png, say"),
        (("--json", "same.png", "--plot", "same.png"), "--json and --plot would both write it"),
        (("--json", "no.folder/"), "no.folder"),
    ],
)
def test_wrong_input_is_refused_before_any_work(
    far: Any, tiny: Tiny, arguments: tuple[Any, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("no.folder").mkdir(exist_ok=True)
    monkeypatch.setattr(far_runtime.bench.matmul_rate.MatmulRate, "open", lambda self: pytest.fail("measured"))
    result = far("bench", tiny.bundle, *arguments)
    assert result.code == 2 and message in result.err and len(result.err.splitlines()) == 1
    assert [path.name for path in Path().iterdir()] == ["no.folder"]


def test_a_plot_without_matplotlib_is_refused_beforehand(far: Any, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = far("bench", tiny.bundle, "--plot", "bench.png")
    assert result.code == 2 and "--plot needs matplotlib; install it with: pip install matplotlib" in result.err


def test_an_engine_whose_library_is_missing_names_the_command(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bench_fake", None)
    spec = EngineSpec("fake", "bench_fake")
    with pytest.raises(FarError, match=r"engine fake: needs bench_fake .*pip install 'far-deploy\[export\]'"):
        spec.open(open_bundle(tiny.bundle, check=False), EngineOptions(), CheckpointFiles())


# Processes

PROGRAM = """
import sys
if __name__ == "__main__":
    import far_runtime.bench.engine_specs as engines
    engines.engine_plugins = lambda: {"fake": "bench_fake"}
    from far_runtime.cli.main import main
    main(sys.argv[1:])
"""


@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_command(tiny: Tiny, tmp_path: Path, ended_by: signal.Signals) -> None:
    program, note = tmp_path / "program.py", tmp_path / "far-bench.pid"
    program.write_text(PROGRAM)
    paths = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    command = subprocess.Popen(
        [sys.executable, str(program), "bench", str(tiny.bundle), "--engine", "fake:log", "--seconds", "600"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_for(lambda: note.exists() and note.read_text() != "")
        engine = int(note.read_text())
        assert alive(engine)
        command.send_signal(ended_by)
        _, err = command.communicate(timeout=60)
    finally:
        command.kill()
    wait_for(lambda: not alive(engine))
    if ended_by != signal.SIGKILL:
        assert command.returncode == 130 and err.strip() == "interrupted"


INTERRUPTED = """
import multiprocessing, os, signal, sys
from multiprocessing.context import SpawnProcess
from far_runtime.bench.worker_process import Worker

class Idle:
    def open(self):
        pass

start = SpawnProcess.start

def interrupted(process):
    if sys.argv[1] == "before":
        signal.raise_signal(signal.SIGINT)
    start(process)
    if sys.argv[1] == "after":
        os.kill(os.getpid(), signal.SIGINT)

if __name__ == "__main__":
    SpawnProcess.start = interrupted
    try:
        Worker(Idle())
    except KeyboardInterrupt:
        print("interrupted")
    assert multiprocessing.active_children() == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interruption_while_a_process_starts_ends_it_in_silence(tmp_path: Path, when: str) -> None:
    """In a process of its own: the signal is for nobody else."""
    program = tmp_path / "interrupted.py"
    program.write_text(INTERRUPTED)
    done = subprocess.run([sys.executable, str(program), when], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")


def wait_for(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "did not come to pass"
        time.sleep(0.05)


def alive(process: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
