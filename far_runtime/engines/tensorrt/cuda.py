"""The calls of the CUDA runtime that the TensorRT engine makes, through cuda-python, each one checked.

Not run on a GPU by us: tests/simulator stands in for the library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from far_runtime.errors import FarError, SettingName
from far_runtime.machine.gpu import cuda_runtime


class CaptureFailed(Exception):
    """A generation cannot be captured or replayed as a CUDA graph, and has to run call by call."""

    def __init__(self, reason: str, permanent: bool = False) -> None:
        """permanent: later generations of the same key cannot be captured either."""
        super().__init__(reason)
        self.permanent = permanent


def load_cuda() -> Any:
    """The module of cuda-python that has the CUDA runtime's calls; FarError where it is not installed."""
    runtime = cuda_runtime()
    if runtime is None:
        raise FarError("cuda-python is not installed; install it with: pip install 'far-deploy[tensorrt]' (or [rtx])")
    return runtime


class Cuda:
    """The calls of the CUDA runtime on the current device, all on one stream, which runs them in order."""

    allocations: int
    """How often device memory or pinned memory was allocated."""
    capturing: bool
    """Whether the stream is being captured into a graph."""
    free_unused: Callable[[], bool]
    """Called when the device is full: frees memory that can be spared, and returns whether there was any."""

    def __init__(self, api: Any) -> None:
        """api: the module of `load_cuda`. FarError where there is no device; so does every call that fails."""
        self._api = api
        self.allocations = 0
        self.capturing = False
        self.free_unused = lambda: False
        try:
            count = self._call("cudaGetDeviceCount")
        except FarError as error:
            raise FarError(
                "no NVIDIA GPU can be used here (",
                error.message,
                "); install its driver, in a container give it the GPU (docker run --gpus all), or use another ",
                SettingName("engine"),
                ", such as onnxruntime",
            ) from None
        if not count:
            raise FarError(
                "no NVIDIA GPU in this machine; use another ", SettingName("engine"), ", such as onnxruntime"
            )
        self.stream = self._call("cudaStreamCreateWithFlags", api.cudaStreamNonBlocking)

    def malloc(self, size: int) -> int:
        """Device memory of `size` bytes; CaptureFailed while a graph is captured, where nothing may be allocated."""
        if self.capturing:
            raise CaptureFailed("device memory is needed that the generation before did not need")
        while True:
            error, address = self._api.cudaMalloc(size)
            if error != self._api.cudaError_t.cudaErrorMemoryAllocation:
                break
            self._api.cudaGetLastError()  # or the next call of the library would report it again
            if not self.free_unused():
                free, total = self._call("cudaMemGetInfo")
                raise FarError(
                    f"the GPU has no room for {mib(size)} more (free: {mib(free)} of {mib(total)}); use a smaller ",
                    SettingName("batch_size"),
                    ", or end what else uses the GPU",
                )
        self._check("cudaMalloc", error)
        self.allocations += 1
        return int(address)

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def malloc_host(self, size: int) -> int:
        """Pinned host memory of `size` bytes; CaptureFailed while a graph is captured."""
        if self.capturing:
            raise CaptureFailed("pinned memory is needed that the generation before did not need")
        try:
            address = self._call("cudaMallocHost", size)
        except FarError as error:
            raise FarError(
                f"{mib(size)} of pinned host memory: ", error.message, "; use a smaller ", SettingName("batch_size")
            ) from None
        self.allocations += 1
        return int(address)

    def free_host(self, address: int) -> None:
        self._call("cudaFreeHost", address)

    def copy_in(self, target: int, source: int, size: int) -> None:
        """Enqueue a copy of `size` bytes from pinned to device memory."""
        direction = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", target, source, size, direction, self.stream)

    def copy_out(self, target: int, source: int, size: int) -> None:
        """Enqueue a copy of `size` bytes from device to pinned memory."""
        direction = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", target, source, size, direction, self.stream)

    def synchronize(self) -> None:
        """Wait until the stream has done everything; CaptureFailed while a graph is captured."""
        if self.capturing:
            raise CaptureFailed("the host wants to read what has not been computed yet", permanent=True)
        self._call("cudaStreamSynchronize", self.stream)

    def begin_capture(self) -> None:
        """Capture the work that is put on the stream from here on, in place of doing it."""
        # Thread-local: what other threads do with CUDA meanwhile is no business of the capture's.
        self._call(
            "cudaStreamBeginCapture", self.stream, self._api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        )
        self.capturing = True

    def end_capture(self) -> Any:
        """The executable graph (cudaGraphExec_t) of the work since `begin_capture`."""
        self.capturing = False
        graph = self._call("cudaStreamEndCapture", self.stream)
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def abandon_capture(self) -> None:
        """End the capture and drop its graph, whatever state it is in."""
        self.capturing = False
        error, graph = self._api.cudaStreamEndCapture(self.stream)
        if error == self._api.cudaError_t.cudaSuccess:
            self._call("cudaGraphDestroy", graph)
        else:  # the capture had become invalid, which is why it is abandoned
            self._api.cudaGetLastError()

    def launch(self, graph: Any) -> None:
        self._call("cudaGraphLaunch", graph, self.stream)

    def destroy(self, graph: Any) -> None:
        self._call("cudaGraphExecDestroy", graph)

    def close(self) -> None:
        self._call("cudaStreamDestroy", self.stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        """Make a call; returns its values without the error code. FarError where it fails."""
        error, *values = getattr(self._api, name)(*arguments)
        self._check(name, error)
        return values[0] if len(values) == 1 else tuple(values)

    def _check(self, name: str, error: Any) -> None:
        if error == self._api.cudaError_t.cudaSuccess:
            return
        _, text = self._api.cudaGetErrorString(error)
        self._api.cudaGetLastError()
        raise FarError(f"{name}: {text.decode() if isinstance(text, bytes) else text}")


def host_view(address: int, size: int) -> NDArray[np.uint8]:
    """The bytes of pinned memory as an array, for as long as it is not freed."""
    import ctypes

    memory: Any = (ctypes.c_uint8 * size).from_address(address)
    view: NDArray[np.uint8] = np.frombuffer(memory, np.uint8)
    return view


def mib(size: int) -> str:
    """A number of bytes for messages: "17 bytes", "3 MiB"."""
    return f"{size} bytes" if size < 1 << 20 else f"{size / (1 << 20):.0f} MiB"
