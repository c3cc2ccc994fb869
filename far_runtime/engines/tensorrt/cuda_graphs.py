"""Whole generations as CUDA graphs: of one key, the first runs call by call, the second is captured, others replay it.

The key stands for all that the sequence of calls depends on: batch size, schedule, settings. In a replay the same
sampling loop runs, but it only writes its input arrays to where the graph reads them. Then the graph is launched, once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from numpy.typing import NDArray

from far_runtime.engines.base import Engine, Generate
from far_runtime.engines.tensorrt.cuda import CaptureFailed, Cuda
from far_runtime.engines.tensorrt.device_memory import ArrayMemory, DeviceArray
from far_runtime.engines.tensorrt.executor import Context, Shapes

Contexts = dict[tuple[str, Shapes], Context]
"""Execution contexts by the name of their graph and the shapes of its inputs."""

MAX_GENERATIONS = 4
"""Most keys whose generations are kept; each has device memory for its whole generation."""


class Session(Protocol):
    """How an engine's `put`, `get` and `run` are carried out at the moment: call by call, captured or replayed."""

    def put(self, array: NDArray[Any]) -> DeviceArray: ...

    def get(self, array: DeviceArray) -> NDArray[Any]: ...

    def run(
        self, stage: str, inputs: Mapping[str, DeviceArray], constants: Mapping[str, int]
    ) -> dict[str, DeviceArray]: ...


class StageRunner(Protocol):
    """What sessions need of the engine."""

    session: Session

    def execute(
        self,
        stage: str,
        inputs: Mapping[str, DeviceArray],
        constants: Mapping[str, int],
        memory: ArrayMemory,
        contexts: Contexts | None,
    ) -> dict[str, DeviceArray]: ...


class EagerSession:
    """Enqueues every call at once."""

    def __init__(self, runner: StageRunner, memory: ArrayMemory, contexts: Contexts | None = None) -> None:
        self._runner, self._memory, self._contexts = runner, memory, contexts
        self.has_read = False

    def put(self, array: NDArray[Any]) -> DeviceArray:
        return self._memory.staging.put(array)[0]

    def get(self, array: DeviceArray) -> NDArray[Any]:
        self.has_read = True
        return self._memory.read({"": array})[""]

    def run(
        self, stage: str, inputs: Mapping[str, DeviceArray], constants: Mapping[str, int]
    ) -> dict[str, DeviceArray]:
        return self._runner.execute(stage, inputs, constants, self._memory, self._contexts)


@dataclass(frozen=True)
class _Put:
    """A captured `put`."""

    pinned: NDArray[Any]
    """Pinned memory that the graph copies the array from."""
    array: DeviceArray
    """What the loop gets for the array."""


@dataclass(frozen=True)
class _Run:
    """A captured `run` of a stage."""

    stage: str
    constants: dict[str, int]
    inputs: dict[str, int]
    """Numbers of the input arrays within the generation."""
    outputs: dict[str, DeviceArray]
    """What the loop gets."""


class CaptureSession:
    """Enqueues every call on the stream that is being captured, and records the calls."""

    def __init__(self, runner: StageRunner, memory: ArrayMemory, contexts: Contexts) -> None:
        self._runner, self._memory, self._contexts = runner, memory, contexts
        self._count = 0
        self.steps: list[_Put | _Run] = []

    def put(self, array: NDArray[Any]) -> DeviceArray:
        uploaded, pinned = self._memory.staging.put(array)
        numbered = self._numbered(uploaded)
        self.steps.append(_Put(pinned, replace(numbered, owner=None)))
        return numbered

    def get(self, array: DeviceArray) -> NDArray[Any]:
        raise CaptureFailed("the host reads an array before the end", permanent=True)

    def run(
        self, stage: str, inputs: Mapping[str, DeviceArray], constants: Mapping[str, int]
    ) -> dict[str, DeviceArray]:
        numbers = {name: self.number_of(array) for name, array in inputs.items()}
        arrays = self._runner.execute(stage, inputs, constants, self._memory, self._contexts)
        outputs = {name: self._numbered(array) for name, array in arrays.items()}
        kept = {name: replace(array, owner=None) for name, array in outputs.items()}
        self.steps.append(_Run(stage, dict(constants), numbers, kept))
        return outputs

    def number_of(self, array: DeviceArray) -> int:
        """The array's number within the generation.

        CaptureFailed for an array from elsewhere: in the next generation its address may belong to another array.
        """
        if array.recording is not self or array.number is None:
            raise CaptureFailed("an array comes from outside of the generation", permanent=True)
        return array.number

    def _numbered(self, array: DeviceArray) -> DeviceArray:
        self._count += 1
        return replace(array, number=self._count, recording=self)


class ReplaySession:
    """Compares every call with the recorded one and writes input arrays to pinned memory; enqueues nothing."""

    def __init__(self, recorder: CaptureSession) -> None:
        self._recorder = recorder
        self._steps = iter(recorder.steps)

    def put(self, array: NDArray[Any]) -> DeviceArray:
        step = next(self._steps, None)
        if not isinstance(step, _Put) or (step.pinned.dtype, step.pinned.shape) != (array.dtype, array.shape):
            raise CaptureFailed("another array is put")
        step.pinned[...] = array
        return step.array

    def get(self, array: DeviceArray) -> NDArray[Any]:
        raise CaptureFailed("the host reads an array before the end")

    def run(
        self, stage: str, inputs: Mapping[str, DeviceArray], constants: Mapping[str, int]
    ) -> dict[str, DeviceArray]:
        step = next(self._steps, None)
        if not isinstance(step, _Run) or (step.stage, step.constants) != (stage, dict(constants)):
            raise CaptureFailed("another stage runs")
        if step.inputs != {name: self._recorder.number_of(array) for name, array in inputs.items()}:
            raise CaptureFailed("a stage runs on other arrays")
        return step.outputs

    def end(self, outputs: Mapping[str, DeviceArray], recorded: Mapping[str, int]) -> None:
        """CaptureFailed unless all recorded calls were made and the outputs are the recorded arrays."""
        numbers = {name: self._recorder.number_of(array) for name, array in outputs.items()}
        if next(self._steps, None) is not None or numbers != dict(recorded):
            raise CaptureFailed("the generation ends otherwise")


@dataclass
class _CachedGeneration:
    """What is kept of the generations of one key."""

    memory: ArrayMemory
    """Memory of all arrays of a generation."""
    contexts: Contexts = field(default_factory=dict)
    """Execution contexts that the graph uses."""
    recorder: CaptureSession | None = None
    """The recorded calls; None before the capture."""
    outputs: dict[str, int] = field(default_factory=dict)
    """Numbers of the output arrays within the generation, by name."""
    graph: Any = None
    """The executable CUDA graph; None before the capture."""


class GraphCache:
    """The captured generations of one engine by key, of which the MAX_GENERATIONS most recently used ones are kept."""

    def __init__(self, runner: StageRunner, cuda: Cuda) -> None:
        self._runner, self._cuda = runner, cuda
        self._generations: OrderedDict[Hashable, _CachedGeneration] = OrderedDict()
        self._uncapturable: set[Hashable] = set()

    def run_generation(self, engine: Engine, key: Hashable, generate: Generate) -> dict[str, NDArray[Any]] | None:
        """Run a generation and return its arrays on the host; None for a key whose generations cannot be captured."""
        if key in self._uncapturable:
            return None
        generation = self._generations.get(key)
        try:
            if generation is not None:
                self._generations.move_to_end(key)
                try:
                    return (
                        self._capture(engine, generation, generate)
                        if generation.graph is None
                        else self._replay(engine, generation, generate)
                    )
                except CaptureFailed as failure:
                    self._drop(key)
                    if failure.permanent:
                        self._uncapturable.add(key)
                        return None
            return self._first(engine, key, generate)
        except BaseException:
            if key in self._generations:
                # Whatever state it is in.
                self._drop(key)
            raise

    def evict_oldest(self) -> bool:
        """Free the memory of the least recently used generation; False where only the one that runs now is left."""
        if len(self._generations) < 2:
            return False
        self._drop(next(iter(self._generations)))
        return True

    def close(self) -> None:
        while self._generations:
            self._drop(next(iter(self._generations)))

    def _first(self, engine: Engine, key: Hashable, generate: Generate) -> dict[str, NDArray[Any]]:
        """Run call by call, in the memory that the graph will use."""
        generation = self._generations[key] = _CachedGeneration(ArrayMemory(self._cuda, reuse=False))
        while len(self._generations) > MAX_GENERATIONS:
            self.evict_oldest()
        session = EagerSession(self._runner, generation.memory, generation.contexts)
        outputs = self._within(session, engine, generate)
        arrays = generation.memory.read(outputs)
        outputs.clear()
        if session.has_read:
            self._drop(key)
            self._uncapturable.add(key)
        return arrays

    def _capture(self, engine: Engine, generation: _CachedGeneration, generate: Generate) -> dict[str, NDArray[Any]]:
        """Run the loop while the stream is captured, then launch the graph."""
        generation.memory.staging.rewind()
        recorder = CaptureSession(self._runner, generation.memory, generation.contexts)
        self._cuda.begin_capture()
        try:
            outputs = self._within(recorder, engine, generate)
            generation.outputs = {name: recorder.number_of(array) for name, array in outputs.items()}
            generation.memory.readback.enqueue(outputs)
        except BaseException:
            self._cuda.abandon_capture()
            raise
        generation.graph, generation.recorder = self._cuda.end_capture(), recorder
        return self._launch(generation)

    def _replay(self, engine: Engine, generation: _CachedGeneration, generate: Generate) -> dict[str, NDArray[Any]]:
        """Run the loop against the recorded calls, then launch the graph."""
        assert generation.recorder is not None
        session = ReplaySession(generation.recorder)
        session.end(self._within(session, engine, generate), generation.outputs)
        return self._launch(generation)

    def _launch(self, generation: _CachedGeneration) -> dict[str, NDArray[Any]]:
        self._cuda.launch(generation.graph)
        self._cuda.synchronize()
        return generation.memory.readback.collect()

    def _within(self, session: Session, engine: Engine, generate: Generate) -> dict[str, DeviceArray]:
        before, self._runner.session = self._runner.session, session
        try:
            return dict(generate(engine))
        finally:
            self._runner.session = before

    def _drop(self, key: Hashable) -> None:
        generation = self._generations.pop(key)
        if generation.graph is not None:
            self._cuda.destroy(generation.graph)
        generation.contexts.clear()
        generation.memory.close()
