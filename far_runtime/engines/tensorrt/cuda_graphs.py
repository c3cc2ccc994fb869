"""Whole generations as CUDA graphs: the first of a kind runs as it comes, the second is captured, others are replayed.

A kind (the `key`) is what the sequence of calls depends on: batch size, schedule, settings. In a replay the very same
loop runs, but all it does is to write its arrays to where the graph reads them; then the graph is launched, once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from numpy.typing import NDArray

from far_runtime.engines.base import Engine, Generate
from far_runtime.engines.tensorrt.cuda import Cuda, Deviation
from far_runtime.engines.tensorrt.device_memory import DeviceArray, Memory
from far_runtime.engines.tensorrt.executor import Context, Shapes

Contexts = dict[tuple[str, Shapes], Context]

KINDS = 4
"""Kinds of generations that are remembered; each one has device memory of its own."""


class Session(Protocol):
    """What an engine's put, get and run come to at the moment."""

    def put(self, array: NDArray[Any]) -> DeviceArray: ...

    def get(self, array: DeviceArray) -> NDArray[Any]: ...

    def run(
        self, stage: str, inputs: Mapping[str, DeviceArray], constants: Mapping[str, int]
    ) -> dict[str, DeviceArray]: ...


class Runner(Protocol):
    """What captures need of the engine."""

    session: Session

    def execute(
        self,
        stage: str,
        inputs: Mapping[str, DeviceArray],
        constants: Mapping[str, int],
        memory: Memory,
        contexts: Contexts | None,
    ) -> dict[str, DeviceArray]: ...


class Direct:
    """Everything is put on the stream as it comes."""

    def __init__(self, runner: Runner, memory: Memory, contexts: Contexts | None = None) -> None:
        self._runner, self._memory, self._contexts = runner, memory, contexts
        self.read = False

    def put(self, array: NDArray[Any]) -> DeviceArray:
        return self._memory.staging.put(array)[0]

    def get(self, array: DeviceArray) -> NDArray[Any]:
        self.read = True
        return self._memory.read({"": array})[""]

    def run(
        self, stage: str, inputs: Mapping[str, DeviceArray], constants: Mapping[str, int]
    ) -> dict[str, DeviceArray]:
        return self._runner.execute(stage, inputs, constants, self._memory, self._contexts)


@dataclass(frozen=True)
class _Put:
    """A `put`: where the graph reads the array, and what the loop gets for it."""

    place: NDArray[Any]
    array: DeviceArray


@dataclass(frozen=True)
class _Run:
    """A `run`: what was asked, with the numbers of its inputs, and what the loop gets for it."""

    stage: str
    constants: dict[str, int]
    inputs: dict[str, int]
    outputs: dict[str, DeviceArray]


class Recorder:
    """Puts everything on a stream that is captured, and writes down the calls."""

    def __init__(self, runner: Runner, memory: Memory, contexts: Contexts) -> None:
        self._runner, self._memory, self._contexts = runner, memory, contexts
        self._count = 0
        self.steps: list[_Put | _Run] = []

    def put(self, array: NDArray[Any]) -> DeviceArray:
        given, place = self._memory.staging.put(array)
        numbered = self._numbered(given)
        self.steps.append(_Put(place, replace(numbered, owner=None)))
        return numbered

    def get(self, array: DeviceArray) -> NDArray[Any]:
        raise Deviation("the host reads an array before the end", always=True)

    def run(
        self, stage: str, inputs: Mapping[str, DeviceArray], constants: Mapping[str, int]
    ) -> dict[str, DeviceArray]:
        numbers = {name: self.number_of(array) for name, array in inputs.items()}
        given = self._runner.execute(stage, inputs, constants, self._memory, self._contexts)
        outputs = {name: self._numbered(array) for name, array in given.items()}
        kept = {name: replace(array, owner=None) for name, array in outputs.items()}
        self.steps.append(_Run(stage, dict(constants), numbers, kept))
        return outputs

    def number_of(self, array: DeviceArray) -> int:
        """Which of the generation's arrays it is; Deviation for one from elsewhere, which the graph would read at an
        address that is another's the next time."""
        if array.recording is not self or array.number is None:
            raise Deviation("an array comes from outside of the generation", always=True)
        return array.number

    def _numbered(self, array: DeviceArray) -> DeviceArray:
        self._count += 1
        return replace(array, number=self._count, recording=self)


class Replay:
    """Compares the calls with the recorded ones and writes arrays to their places; nothing reaches the device."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._steps = iter(recorder.steps)

    def put(self, array: NDArray[Any]) -> DeviceArray:
        step = next(self._steps, None)
        if not isinstance(step, _Put) or (step.place.dtype, step.place.shape) != (array.dtype, array.shape):
            raise Deviation("another array is put")
        step.place[...] = array
        return step.array

    def get(self, array: DeviceArray) -> NDArray[Any]:
        raise Deviation("the host reads an array before the end")

    def run(
        self, stage: str, inputs: Mapping[str, DeviceArray], constants: Mapping[str, int]
    ) -> dict[str, DeviceArray]:
        step = next(self._steps, None)
        if not isinstance(step, _Run) or (step.stage, step.constants) != (stage, dict(constants)):
            raise Deviation("another stage runs")
        if step.inputs != {name: self._recorder.number_of(array) for name, array in inputs.items()}:
            raise Deviation("a stage runs on other arrays")
        return step.outputs

    def end(self, outputs: Mapping[str, DeviceArray], recorded: Mapping[str, int]) -> None:
        """Nothing is left out, and what comes out is what came out."""
        numbers = {name: self._recorder.number_of(array) for name, array in outputs.items()}
        if next(self._steps, None) is not None or numbers != dict(recorded):
            raise Deviation("the generation ends otherwise")


@dataclass
class _Kind:
    """A kind of generation: its memory and contexts, and once it is captured its graph."""

    memory: Memory
    contexts: Contexts = field(default_factory=dict)
    recorder: Recorder | None = None
    outputs: dict[str, int] = field(default_factory=dict)
    graph: Any = None


class Captures:
    """The generations of one engine, by kind; the least recently drawn of more than KINDS is given up."""

    def __init__(self, runner: Runner, cuda: Cuda) -> None:
        self._runner, self._cuda = runner, cuda
        self._kinds: OrderedDict[Hashable, _Kind] = OrderedDict()
        self._hopeless: set[Hashable] = set()

    def run_generation(self, engine: Engine, key: Hashable, make: Generate) -> dict[str, NDArray[Any]] | None:
        """The arrays of a generation of this kind, on the host; None for a kind that cannot be captured."""
        if key in self._hopeless:
            return None
        kind = self._kinds.get(key)
        try:
            if kind is not None:
                self._kinds.move_to_end(key)
                try:
                    return self._capture(engine, kind, make) if kind.graph is None else self._replay(engine, kind, make)
                except Deviation as deviation:
                    self._drop(key)
                    if deviation.always:
                        self._hopeless.add(key)
                        return None
            return self._first(engine, key, make)
        except BaseException:
            if key in self._kinds:
                self._drop(key)  # whatever state it is in
            raise

    def give_up_one(self) -> bool:
        """Free the memory of the kind that has not been drawn for longest, but not of the one that is being drawn."""
        if len(self._kinds) < 2:
            return False
        self._drop(next(iter(self._kinds)))
        return True

    def close(self) -> None:
        while self._kinds:
            self._drop(next(iter(self._kinds)))

    def _first(self, engine: Engine, key: Hashable, make: Generate) -> dict[str, NDArray[Any]]:
        """Run as it comes, in the memory that the graph will have."""
        kind = self._kinds[key] = _Kind(Memory(self._cuda, reuse=False))
        while len(self._kinds) > KINDS:
            self.give_up_one()
        session = Direct(self._runner, kind.memory, kind.contexts)
        outputs = self._within(session, engine, make)
        made = kind.memory.read(outputs)
        outputs.clear()
        if session.read:
            self._drop(key)
            self._hopeless.add(key)
        return made

    def _capture(self, engine: Engine, kind: _Kind, make: Generate) -> dict[str, NDArray[Any]]:
        """Run the loop while the stream's work is written down, then launch that."""
        kind.memory.staging.rewind()
        recorder = Recorder(self._runner, kind.memory, kind.contexts)
        self._cuda.begin_capture()
        try:
            outputs = self._within(recorder, engine, make)
            kind.outputs = {name: recorder.number_of(array) for name, array in outputs.items()}
            kind.memory.outbox.expect(outputs)
        except BaseException:
            self._cuda.abandon_capture()
            raise
        kind.graph, kind.recorder = self._cuda.end_capture(), recorder
        return self._launch(kind)

    def _replay(self, engine: Engine, kind: _Kind, make: Generate) -> dict[str, NDArray[Any]]:
        """Run the loop against the recording, then launch the graph."""
        assert kind.recorder is not None
        session = Replay(kind.recorder)
        session.end(self._within(session, engine, make), kind.outputs)
        return self._launch(kind)

    def _launch(self, kind: _Kind) -> dict[str, NDArray[Any]]:
        self._cuda.launch(kind.graph)
        self._cuda.synchronize()
        return kind.memory.outbox.collect()

    def _within(self, session: Session, engine: Engine, make: Generate) -> dict[str, DeviceArray]:
        before, self._runner.session = self._runner.session, session
        try:
            return dict(make(engine))
        finally:
            self._runner.session = before

    def _drop(self, key: Hashable) -> None:
        kind = self._kinds.pop(key)
        if kind.graph is not None:
            self._cuda.destroy(kind.graph)
        kind.contexts.clear()
        kind.memory.close()
