"""Memory for arrays on a GPU: a pool of device buffers, and pinned host memory on the way in and out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from far_runtime.engines.tensorrt.cuda import CaptureFailed, Cuda, host_view

ALIGNMENT = 256
BLOCK_BYTES = 4 << 20
"""Bytes of pinned memory that are allocated at once."""

MAX_IN_FLIGHT = 64 << 20
"""Most bytes on their way to the device; then the host waits for the copies, and uses their pinned memory again."""


class Buffer:
    """Device memory that goes back to its pool when the last array in it is dropped.

    Work that still reads it was enqueued on the stream before any work that will write to it.
    """

    __slots__ = ("_pool", "address", "size")

    def __init__(self, pool: BufferPool, address: int, size: int) -> None:
        self._pool, self.address, self.size = pool, address, size

    def __del__(self) -> None:
        self._pool.release(self.address, self.size)


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """An array on the device."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    address: int
    """Device address of its first byte."""
    owner: Buffer | None = None
    """The buffer that it lies in; None where a captured graph owns the memory."""
    number: int | None = None
    """Its number within a captured generation; None outside of one."""
    recording: object = None
    """The capture session that numbered it."""

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


class BufferPool:
    """Device buffers by size, kept for the next array of their size.

    Sizes repeat from step to step and from picture to picture, so after the first picture nothing is allocated.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._free: dict[int, list[int]] = defaultdict(list)
        self._sizes: dict[int, int] = {}

    def take(self, size: int) -> Buffer:
        """A buffer of at least `size` bytes, and of at least one: TensorRT wants an address for empty arrays too."""
        size = aligned(max(size, 1))
        if self._free[size]:
            return Buffer(self, self._free[size].pop(), size)
        address = self._cuda.malloc(size)
        self._sizes[address] = size
        return Buffer(self, address, size)

    def array(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> DeviceArray:
        """A new array in a buffer of its own."""
        buffer = self.take(dtype.itemsize * int(np.prod(shape, dtype=np.int64)))
        return DeviceArray(dtype, shape, buffer.address, buffer)

    def release(self, address: int, size: int) -> None:
        # Otherwise the pool was closed before the array was dropped.
        if address in self._sizes:
            self._free[size].append(address)

    @property
    def bytes(self) -> int:
        """Bytes of all buffers, in use or not."""
        return sum(self._sizes.values())

    def trim(self) -> bool:
        """Free the buffers that are not in use; whether there was any."""
        unused = [address for addresses in self._free.values() for address in addresses]
        self._free.clear()
        for address in unused:
            del self._sizes[address]
            self._cuda.free(address)
        return bool(unused)

    def close(self) -> None:
        for address in self._sizes:
            self._cuda.free(address)
        self._sizes.clear()
        self._free.clear()


@dataclass
class _Block:
    """A block of pinned memory."""

    address: int
    view: NDArray[np.uint8]
    """Its bytes."""
    used: int = 0
    """How many of its bytes, from the first, have held arrays."""


class Staging:
    """Pinned memory through which arrays go to the device, one after the other in the order of their `put`.

    After `rewind`, the same sequence of arrays lies at the same addresses again.
    """

    def __init__(self, cuda: Cuda, pool: BufferPool, reuse: bool) -> None:
        """reuse: whether pinned memory is used again once the stream has been waited for.

        If so, every array has its own device buffer. If not (for captured generations), every array keeps its pinned
        memory, and the arrays of a block share one device buffer with the block's layout: one copy uploads them all.
        """
        self._cuda, self._pool, self._reuse = cuda, pool, reuse
        self._blocks: list[_Block] = []
        self._current, self._position, self._in_flight = -1, 0, 0
        self._device: Buffer | None = None

    def put(self, array: NDArray[Any], pool: BufferPool | None = None) -> tuple[DeviceArray, NDArray[Any]]:
        """The array on the device, and the array of the same dtype and shape in pinned memory.

        pool: of the device buffer; default: the pool that the staging was made with.

        While a graph is captured, the whole block is copied at once: the graph reads it when it is launched, and by
        then all of its arrays are there.
        """
        is_new_block = self._reserve(array.nbytes)
        block, start = self._blocks[self._current], self._position
        self._position = aligned(start + max(array.nbytes, 1))
        pinned = block.view[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        pinned[...] = array
        if self._reuse:
            device = (pool or self._pool).array(array.dtype, array.shape)
        else:
            if is_new_block or self._device is None:
                # The buffer goes back to the pool first.
                self._device = None
                self._device = self._pool.take(len(block.view))
                if self._cuda.capturing:
                    self._cuda.copy_in(self._device.address, block.address, block.used)
            device = DeviceArray(array.dtype, array.shape, self._device.address + start, self._device)
        if self._cuda.capturing:
            if start + array.nbytes > block.used:
                raise CaptureFailed("more arrays are put than in the generation before")
        elif array.nbytes:
            self._cuda.copy_in(device.address, block.address + start, array.nbytes)
        block.used = max(block.used, start + array.nbytes)
        self._in_flight += array.nbytes
        return device, pinned

    def _reserve(self, size: int) -> bool:
        """Go on to a block with room for `size` bytes; whether it is another block than before."""
        if self._reuse and self._in_flight + size > MAX_IN_FLIGHT and self._in_flight:
            self._cuda.synchronize()
            self.rewind()
        if self._current >= 0 and self._position + size <= len(self._blocks[self._current].view):
            return False
        following = range(self._current + 1, len(self._blocks))
        index = next((i for i in following if len(self._blocks[i].view) >= size), None)
        if index is None:
            index, length = len(self._blocks), max(BLOCK_BYTES, aligned(size))
            address = self._cuda.malloc_host(length)
            self._blocks.append(_Block(address, host_view(address, length)))
        self._current, self._position = index, 0
        return True

    def rewind(self) -> None:
        """Begin at the first block again; all copies to the device must be done."""
        self._current, self._position, self._in_flight, self._device = -1, 0, 0, None

    def synchronized(self) -> None:
        """To be called when the stream has been waited for."""
        if self._reuse:
            self.rewind()

    def close(self) -> None:
        self.rewind()
        for block in self._blocks:
            self._cuda.free_host(block.address)
        self._blocks.clear()


class Readback:
    """Pinned memory that arrays are copied to from the device."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._address, self._view = 0, np.zeros(0, np.uint8)
        self._enqueued: dict[str, tuple[DeviceArray, int]] = {}

    def enqueue(self, arrays: Mapping[str, DeviceArray]) -> None:
        """Enqueue the copies of some arrays to pinned memory."""
        end, self._enqueued = 0, {}
        for name, array in arrays.items():
            self._enqueued[name] = (array, end)
            end = aligned(end + array.nbytes)
        if end > len(self._view):
            address = self._cuda.malloc_host(end)
            self.close()
            self._address, self._view = address, host_view(address, end)
        for array, start in self._enqueued.values():
            if array.nbytes:
                self._cuda.copy_out(self._address + start, array.address, array.nbytes)
        # From here on only dtypes, shapes and offsets matter: the device memory may go back to the pool.
        self._enqueued = {
            name: (DeviceArray(array.dtype, array.shape, 0), start) for name, (array, start) in self._enqueued.items()
        }

    def collect(self) -> dict[str, NDArray[Any]]:
        """The arrays of the last `enqueue`; the stream must have been waited for."""
        return {
            name: self._view[start : start + array.nbytes].view(array.dtype).reshape(array.shape).copy()
            for name, (array, start) in self._enqueued.items()
        }

    def close(self) -> None:
        if self._address:
            self._view = np.zeros(0, np.uint8)
            self._cuda.free_host(self._address)
            self._address = 0


class ArrayMemory:
    """Device memory for arrays, with pinned memory for uploads and downloads. reuse: as for `Staging`."""

    def __init__(self, cuda: Cuda, reuse: bool) -> None:
        self.pool = BufferPool(cuda)
        self.staging = Staging(cuda, self.pool, reuse)
        self.readback = Readback(cuda)
        self._cuda = cuda

    def read(self, arrays: Mapping[str, DeviceArray]) -> dict[str, NDArray[Any]]:
        """Copy arrays to the host, with one wait for all of them."""
        self.readback.enqueue(arrays)
        self._cuda.synchronize()
        self.staging.synchronized()
        return self.readback.collect()

    def close(self) -> None:
        self.staging.close()
        self.readback.close()
        self.pool.close()


def aligned(size: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT
