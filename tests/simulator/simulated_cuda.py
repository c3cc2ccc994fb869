"""The calls of the CUDA runtime that the TensorRT engine makes, on host memory.

Strict where the device is: work waits in its stream until something runs it (a synchronisation, or before that as
chance has it), so a result that is read too early is garbage and a staging buffer that is written too early spoils the
copy; every address must lie in a live allocation of the right kind; what is illegal during capture fails and spoils it.
What would be undefined on a device raises SimulatorError, which nothing in far_runtime catches.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 256
GARBAGE, FREED = 0xA5, 0xDD


class SimulatorError(AssertionError):
    """On a device this would be undefined, or a crash."""


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


SAID = {
    cudaError_t.cudaSuccess: "no error",
    cudaError_t.cudaErrorInvalidValue: "invalid argument",
    cudaError_t.cudaErrorMemoryAllocation: "out of memory",
    cudaError_t.cudaErrorInsufficientDriver: "CUDA driver version is insufficient for CUDA runtime version",
    cudaError_t.cudaErrorNoDevice: "no CUDA-capable device is detected",
    cudaError_t.cudaErrorStreamCaptureUnsupported: "operation not permitted when stream is capturing",
    cudaError_t.cudaErrorStreamCaptureInvalidated: "operation failed due to a previous error during capture",
}

Work = Callable[[], None]


@dataclass
class Allocation:
    """Memory that a call gave out. kind: "device" or "pinned"."""

    address: int
    size: int
    kind: str
    memory: NDArray[np.uint8]


@dataclass(eq=False)
class Stream:
    """Work in order. captured: what a capture has written down; None while there is no capture. valid: whether nothing
    has spoilt it."""

    number: int
    waiting: list[Work] = field(default_factory=list)
    captured: list[Work] | None = None
    valid: bool = True

    def __int__(self) -> int:
        return self.number


@dataclass(eq=False)
class Graph:
    """A captured graph, or one ready to be launched."""

    work: list[Work]
    alive: bool = True


class SimulatedCuda:
    """Stands in for the module cuda.bindings.runtime.

    devices: how many there are. capacity: bytes of device memory. early: the chance that waiting work is done after
    each call, from 0 (at synchronisation only) to 1 (at once). faults: errors to be given by the calls of these names.
    """

    cudaError_t = cudaError_t
    cudaMemcpyKind = cudaMemcpyKind
    cudaStreamCaptureMode = cudaStreamCaptureMode
    cudaStreamNonBlocking = 1

    def __init__(self, devices: int = 1, capacity: int = 1 << 30, early: float = 0.0, seed: int = 0) -> None:
        self._devices, self._capacity, self._early = devices, capacity, early
        self._chance = random.Random(seed)
        self._live: dict[int, Allocation] = {}
        self._graveyard: list[NDArray[np.uint8]] = []
        self._streams: dict[int, Stream] = {}
        self.pending_error = cudaError_t.cudaSuccess
        self.faults: dict[str, cudaError_t] = {}
        self.allocated: list[int] = []
        self.launches = 0
        self.copies = 0

    # What tests look at

    @property
    def live(self) -> dict[str, int]:
        """Bytes in live allocations by kind."""
        return {kind: sum(a.size for a in self._live.values() if a.kind == kind) for kind in ("device", "pinned")}

    def bytes_at(self, address: int, size: int, kind: str) -> NDArray[np.uint8]:
        """The bytes of a live allocation; SimulatorError for an address that is not in one."""
        for allocation in self._live.values():
            start = address - allocation.address
            if start >= 0 and start + size <= allocation.size and allocation.kind == kind:
                return allocation.memory[start : start + size]
        raise SimulatorError(f"{size} bytes at {address:#x}: not in live {kind} memory")

    def stream(self, handle: int) -> Stream:
        """The stream of a handle as TensorRT takes it."""
        if handle not in self._streams:
            raise SimulatorError(f"no stream {handle}")
        return self._streams[handle]

    def enqueue(self, stream: Stream, work: Work) -> None:
        """Work that comes next on a stream, or in the graph that is captured from it."""
        if stream.captured is not None:
            stream.captured.append(work)
            return
        stream.waiting.append(work)
        if self._chance.random() < self._early:
            self._run(stream)

    def spoil(self, stream: Stream) -> None:
        """Something happened that cannot be captured."""
        stream.valid = False

    # The calls

    def cudaGetDeviceCount(self) -> tuple[cudaError_t, int | None]:
        error = self._fault("cudaGetDeviceCount")
        return (error, None) if error else (cudaError_t.cudaSuccess, self._devices)

    def cudaGetErrorString(self, error: cudaError_t) -> tuple[cudaError_t, bytes]:
        return cudaError_t.cudaSuccess, SAID[error].encode()

    def cudaGetLastError(self) -> tuple[cudaError_t]:
        error, self.pending_error = self.pending_error, cudaError_t.cudaSuccess
        return (error,)

    def cudaMemGetInfo(self) -> tuple[cudaError_t, int, int]:
        return cudaError_t.cudaSuccess, self._capacity - self.live["device"], self._capacity

    def cudaMalloc(self, size: int) -> tuple[cudaError_t, int | None]:
        return self._allocate("cudaMalloc", size, "device")

    def cudaFree(self, devPtr: int) -> tuple[cudaError_t]:
        return self._free("cudaFree", devPtr, "device")

    def cudaMallocHost(self, size: int) -> tuple[cudaError_t, int | None]:
        return self._allocate("cudaMallocHost", size, "pinned")

    def cudaFreeHost(self, ptr: int) -> tuple[cudaError_t]:
        return self._free("cudaFreeHost", ptr, "pinned")

    def cudaMemcpyAsync(
        self, dst: int, src: int, count: int, kind: cudaMemcpyKind, stream: Stream
    ) -> tuple[cudaError_t]:
        if error := self._fault("cudaMemcpyAsync"):
            return (error,)
        to, source = ("device", "pinned") if kind == cudaMemcpyKind.cudaMemcpyHostToDevice else ("pinned", "device")
        self.bytes_at(dst, count, to)
        self.bytes_at(src, count, source)

        def copy() -> None:
            self.copies += 1
            self.bytes_at(dst, count, to)[:] = self.bytes_at(src, count, source)

        self.enqueue(self._mine(stream), copy)
        return (cudaError_t.cudaSuccess,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[cudaError_t, Stream]:
        stream = Stream(len(self._streams) + 1)
        self._streams[stream.number] = stream
        return cudaError_t.cudaSuccess, stream

    def cudaStreamDestroy(self, stream: Stream) -> tuple[cudaError_t]:
        self._run(self._mine(stream))
        del self._streams[stream.number]
        return (cudaError_t.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: Stream) -> tuple[cudaError_t]:
        if self._capturing("cudaStreamSynchronize"):
            return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
        if error := self._fault("cudaStreamSynchronize"):
            return (error,)
        self._run(self._mine(stream))
        return (cudaError_t.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: Stream, mode: cudaStreamCaptureMode) -> tuple[cudaError_t]:
        if self._mine(stream).captured is not None:
            raise SimulatorError("the stream is captured already")
        stream.captured, stream.valid = [], True
        return (cudaError_t.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: Stream) -> tuple[cudaError_t, Graph | None]:
        work, valid = self._mine(stream).captured, stream.valid
        if work is None:
            raise SimulatorError("the stream is not captured")
        stream.captured, stream.valid = None, True
        if not valid:
            self.pending_error = cudaError_t.cudaErrorStreamCaptureInvalidated
            return cudaError_t.cudaErrorStreamCaptureInvalidated, None
        return cudaError_t.cudaSuccess, Graph(work)

    def cudaGraphInstantiate(self, graph: Graph, flags: int) -> tuple[cudaError_t, Graph | None]:
        if error := self._fault("cudaGraphInstantiate"):
            return error, None
        self._alive(graph)
        return cudaError_t.cudaSuccess, Graph(list(graph.work))

    def cudaGraphLaunch(self, graphExec: Graph, stream: Stream) -> tuple[cudaError_t]:
        self._alive(graphExec)
        self.launches += 1
        for work in graphExec.work:
            self.enqueue(self._mine(stream), work)
        return (cudaError_t.cudaSuccess,)

    def cudaGraphDestroy(self, graph: Graph) -> tuple[cudaError_t]:
        self._alive(graph).alive = False
        return (cudaError_t.cudaSuccess,)

    def cudaGraphExecDestroy(self, graphExec: Graph) -> tuple[cudaError_t]:
        self._alive(graphExec).alive = False
        return (cudaError_t.cudaSuccess,)

    # How they work

    def _allocate(self, name: str, size: int, kind: str) -> tuple[cudaError_t, int | None]:
        if self._capturing(name):
            return cudaError_t.cudaErrorStreamCaptureUnsupported, None
        error = self._fault(name)
        if not error and kind == "device" and self.live["device"] + size > self._capacity:
            error = cudaError_t.cudaErrorMemoryAllocation
        if error:
            self.pending_error = error
            return error, None
        if size < 1:
            raise SimulatorError(f"{name}: {size} bytes")
        whole = np.full(size + ALIGNMENT, GARBAGE, np.uint8)
        start = -whole.ctypes.data % ALIGNMENT
        memory = whole[start : start + size]
        self._live[memory.ctypes.data] = Allocation(memory.ctypes.data, size, kind, memory)
        self.allocated.append(size)
        return cudaError_t.cudaSuccess, memory.ctypes.data

    def _free(self, name: str, address: int, kind: str) -> tuple[cudaError_t]:
        if self._capturing(name):
            return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
        for stream in self._streams.values():  # freeing waits for the device
            self._run(stream)
        allocation = self._live.get(address)
        if allocation is None or allocation.kind != kind:
            raise SimulatorError(f"{name}: {address:#x} is no live {kind} allocation")
        del self._live[address]
        allocation.memory[:] = FREED
        self._graveyard.append(allocation.memory)  # so that nothing else comes to lie there and hides a late use
        return (cudaError_t.cudaSuccess,)

    def _capturing(self, name: str) -> bool:
        """Whether a call that waits for the device, or may, comes during a capture, which it spoils."""
        capturing = [stream for stream in self._streams.values() if stream.captured is not None]
        for stream in capturing:
            self.spoil(stream)
        return bool(capturing)

    def _run(self, stream: Stream) -> None:
        while stream.waiting:
            stream.waiting.pop(0)()

    def _mine(self, stream: Stream) -> Stream:
        if self._streams.get(getattr(stream, "number", 0)) is not stream:
            raise SimulatorError(f"{stream}: no stream, or destroyed")
        return stream

    def _alive(self, graph: Any) -> Graph:
        if not isinstance(graph, Graph) or not graph.alive:
            raise SimulatorError("no graph, or destroyed")
        return graph

    def _fault(self, name: str) -> cudaError_t:
        error = self.faults.get(name, cudaError_t.cudaSuccess)
        self.pending_error = error or self.pending_error
        return error
