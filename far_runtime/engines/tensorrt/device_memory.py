"""Memory for arrays on a GPU: a pool of device buffers, and pinned host memory on the way in and out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from far_runtime.engines.tensorrt.cuda import Cuda, Deviation, host_view

ALIGNMENT = 256
BLOCK = 4 << 20
"""Bytes of pinned memory that are asked for at once."""

WAITING = 64 << 20
"""Bytes on the way to the device after which the host waits for them, where their pinned memory is used again."""


class Buffer:
    """Device memory that goes back to its pool with the last array that lies in it.

    What still reads it then is on the stream already, before anything that will write to it.
    """

    __slots__ = ("_pool", "address", "size")

    def __init__(self, pool: Pool, address: int, size: int) -> None:
        self._pool, self.address, self.size = pool, address, size

    def __del__(self) -> None:
        self._pool.give_back(self.address, self.size)


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """An array on the device. owner: the buffer that it lies in; None where a captured graph owns it. number: which of
    its recording's arrays it is; None outside of one."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    address: int
    owner: Buffer | None = None
    number: int | None = None
    recording: object = None

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


class Pool:
    """Device buffers by size. Sizes repeat from step to step and from picture to picture, so that after the first
    picture nothing is allocated."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._free: dict[int, list[int]] = defaultdict(list)
        self._sizes: dict[int, int] = {}

    def take(self, size: int) -> Buffer:
        """A buffer of `size` bytes or a little more, never of none: TensorRT wants an address of empty arrays too."""
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

    def give_back(self, address: int, size: int) -> None:
        if address in self._sizes:  # else the pool was closed before the array was dropped
            self._free[size].append(address)

    @property
    def bytes(self) -> int:
        """Bytes that it holds, in use or not."""
        return sum(self._sizes.values())

    def trim(self) -> bool:
        """Free what is not in use; whether there was any."""
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
    """Pinned memory. used: bytes of it that arrays have lain in."""

    address: int
    view: NDArray[np.uint8]
    used: int = 0


class Staging:
    """Pinned memory through which arrays go to the device, one after the other in the order of their `put`.

    The same arrays put again after `rewind` find the same places. reuse: places are taken again once the stream has
    been waited for, and every array has a device buffer of its own. Otherwise, for captured generations, every array
    keeps its place, and a block's arrays lie in one device buffer as in the block, so that one copy brings them all.
    """

    def __init__(self, cuda: Cuda, pool: Pool, reuse: bool) -> None:
        self._cuda, self._pool, self._reuse = cuda, pool, reuse
        self._blocks: list[_Block] = []
        self._current, self._position, self._waiting = -1, 0, 0
        self._device: Buffer | None = None

    def put(self, array: NDArray[Any], pool: Pool | None = None) -> tuple[DeviceArray, NDArray[Any]]:
        """The array on the device, and its place in pinned memory, of the same dtype and shape.

        pool: where it is to lie, if not in the staging's own.

        While a graph is captured, what is copied is the whole block at once: the graph reads it when it is launched,
        and by then all of its arrays are there.
        """
        opened = self._place(array.nbytes)
        block, start = self._blocks[self._current], self._position
        self._position = aligned(start + max(array.nbytes, 1))
        place = block.view[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        place[...] = array
        if self._reuse:
            device = (pool or self._pool).array(array.dtype, array.shape)
        else:
            if opened or self._device is None:
                self._device = None  # back to the pool first
                self._device = self._pool.take(len(block.view))
                if self._cuda.capturing:
                    self._cuda.copy_in(self._device.address, block.address, block.used)
            device = DeviceArray(array.dtype, array.shape, self._device.address + start, self._device)
        if self._cuda.capturing:
            if start + array.nbytes > block.used:
                raise Deviation("more arrays are put than in the generation before")
        elif array.nbytes:
            self._cuda.copy_in(device.address, block.address + start, array.nbytes)
        block.used = max(block.used, start + array.nbytes)
        self._waiting += array.nbytes
        return device, place

    def _place(self, size: int) -> bool:
        """Go to a block with room for `size` bytes; whether it is another one."""
        if self._reuse and self._waiting + size > WAITING and self._waiting:
            self._cuda.synchronize()
            self.rewind()
        if self._current >= 0 and self._position + size <= len(self._blocks[self._current].view):
            return False
        following = range(self._current + 1, len(self._blocks))
        find_compatible = (i for i in following if len(self._blocks[i].view) >= size)
        found = next(find_compatible, None)
        if found is None:
            found, length = len(self._blocks), max(BLOCK, aligned(size))
            address = self._cuda.malloc_host(length)
            self._blocks.append(_Block(address, host_view(address, length)))
        self._current, self._position = found, 0
        return True

    def rewind(self) -> None:
        """Begin at the first place again; what was there must have reached the device."""
        self._current, self._position, self._waiting, self._device = -1, 0, 0, None

    def synchronized(self) -> None:
        """The stream has been waited for."""
        if self._reuse:
            self.rewind()

    def close(self) -> None:
        self.rewind()
        for block in self._blocks:
            self._cuda.free_host(block.address)
        self._blocks.clear()


class Outbox:
    """Pinned memory in which arrays arrive from the device."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._address, self._view = 0, np.zeros(0, np.uint8)
        self._expected: dict[str, tuple[DeviceArray, int]] = {}

    def expect(self, arrays: Mapping[str, DeviceArray]) -> None:
        """Have them sent when the stream gets there."""
        end, self._expected = 0, {}
        for name, array in arrays.items():
            self._expected[name] = (array, end)
            end = aligned(end + array.nbytes)
        if end > len(self._view):
            address = self._cuda.malloc_host(end)
            self.close()
            self._address, self._view = address, host_view(address, end)
        for array, start in self._expected.values():
            if array.nbytes:
                self._cuda.copy_out(self._address + start, array.address, array.nbytes)
        # Only their places matter from here on: their memory may go back to the pool.
        self._expected = {
            name: (DeviceArray(array.dtype, array.shape, 0), start) for name, (array, start) in self._expected.items()
        }

    def collect(self) -> dict[str, NDArray[Any]]:
        """The arrays, once the stream has been waited for."""
        return {
            name: self._view[start : start + array.nbytes].view(array.dtype).reshape(array.shape).copy()
            for name, (array, start) in self._expected.items()
        }

    def close(self) -> None:
        if self._address:
            self._view = np.zeros(0, np.uint8)
            self._cuda.free_host(self._address)
            self._address = 0


class Memory:
    """A pool with its ways in and out. reuse: as `Staging` has it."""

    def __init__(self, cuda: Cuda, reuse: bool) -> None:
        self.pool = Pool(cuda)
        self.staging = Staging(cuda, self.pool, reuse)
        self.outbox = Outbox(cuda)
        self._cuda = cuda

    def read(self, arrays: Mapping[str, DeviceArray]) -> dict[str, NDArray[Any]]:
        """Arrays as they are on the device, all in one go."""
        self.outbox.expect(arrays)
        self._cuda.synchronize()
        self.staging.synchronized()
        return self.outbox.collect()

    def close(self) -> None:
        self.staging.close()
        self.outbox.close()
        self.pool.close()


def aligned(size: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT
