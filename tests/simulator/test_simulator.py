"""The simulator is as strict as the libraries are: a wrong engine would fail on it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from far_runtime.engines.tensorrt import cuda as cuda_calls
from far_runtime.engines.tensorrt.cuda import Cuda, host_view
from far_runtime.engines.tensorrt.device_memory import ArrayMemory
from simulated_cuda import SimulatedCuda, SimulatorError, cudaError_t, cudaMemcpyKind

IN, OUT = cudaMemcpyKind.cudaMemcpyHostToDevice, cudaMemcpyKind.cudaMemcpyDeviceToHost


@pytest.fixture
def cuda() -> SimulatedCuda:
    return SimulatedCuda()


@pytest.fixture
def stream(cuda: SimulatedCuda) -> Any:
    return cuda.cudaStreamCreateWithFlags(1)[1]


def test_results_are_garbage_before_a_synchronisation(cuda: SimulatedCuda, stream: Any) -> None:
    (_, there), (_, here) = cuda.cudaMalloc(4), cuda.cudaMallocHost(4)
    host_view(here, 4)[:] = 7
    cuda.cudaMemcpyAsync(there, here, 4, IN, stream)
    _, back = cuda.cudaMallocHost(4)
    cuda.cudaMemcpyAsync(back, there, 4, OUT, stream)
    assert host_view(back, 4).tolist() != [7] * 4
    cuda.cudaStreamSynchronize(stream)
    assert host_view(back, 4).tolist() == [7] * 4


def test_a_staging_buffer_that_is_written_too_early_spoils_the_copy(cuda: SimulatedCuda, stream: Any) -> None:
    (_, there), (_, here) = cuda.cudaMalloc(4), cuda.cudaMallocHost(4)
    host_view(here, 4)[:] = 7
    cuda.cudaMemcpyAsync(there, here, 4, IN, stream)
    host_view(here, 4)[:] = 8
    cuda.cudaStreamSynchronize(stream)
    assert cuda.bytes_at(there, 4, "device").tolist() == [8] * 4


def test_addresses_must_be_live_large_enough_and_of_their_kind(cuda: SimulatedCuda, stream: Any) -> None:
    (_, there), (_, here) = cuda.cudaMalloc(4), cuda.cudaMallocHost(8)
    pageable = np.zeros(4, np.uint8).ctypes.data
    for arguments in ((there, here, 8, IN), (here, there, 4, IN), (there, pageable, 4, IN), (12345, here, 4, IN)):
        with pytest.raises(SimulatorError, match="not in live"):
            cuda.cudaMemcpyAsync(*arguments, stream)
    cuda.cudaFree(there)
    for call in (lambda: cuda.cudaMemcpyAsync(there, here, 4, IN, stream), lambda: cuda.cudaFree(there)):
        with pytest.raises(SimulatorError):
            call()


def test_memory_freed_after_a_capture_is_noticed_at_the_launch(cuda: SimulatedCuda, stream: Any) -> None:
    (_, there), (_, here) = cuda.cudaMalloc(4), cuda.cudaMallocHost(4)
    cuda.cudaStreamBeginCapture(stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
    cuda.cudaMemcpyAsync(there, here, 4, IN, stream)
    _, graph = cuda.cudaStreamEndCapture(stream)
    _, ready = cuda.cudaGraphInstantiate(graph, 0)
    cuda.cudaGraphLaunch(ready, stream)
    cuda.cudaStreamSynchronize(stream)
    cuda.cudaFree(there)
    cuda.cudaGraphLaunch(ready, stream)
    with pytest.raises(SimulatorError, match="not in live"):
        cuda.cudaStreamSynchronize(stream)
    cuda.cudaGraphExecDestroy(ready)
    with pytest.raises(SimulatorError, match="destroyed"):
        cuda.cudaGraphLaunch(ready, stream)


@pytest.mark.parametrize("call", ["cudaMalloc", "cudaMallocHost", "cudaFree", "cudaStreamSynchronize"])
def test_what_waits_for_the_device_spoils_a_capture(cuda: SimulatedCuda, stream: Any, call: str) -> None:
    argument = {"cudaFree": cuda.cudaMalloc(4)[1], "cudaStreamSynchronize": stream}.get(call, 4)
    cuda.cudaStreamBeginCapture(stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
    assert getattr(cuda, call)(argument)[0] == cudaError_t.cudaErrorStreamCaptureUnsupported
    assert cuda.cudaStreamEndCapture(stream) == (cudaError_t.cudaErrorStreamCaptureInvalidated, None)


@pytest.fixture
def context(simulation: Any, tiny: Any) -> Any:
    """Of the decoder, with its shape set but nothing else."""
    made = simulation.engine(tiny.bundle)._executors["decode"]._engine.create_execution_context
    config = simulation.module.ExecutionContextAllocationStrategy.USER_MANAGED
    simulation.device.rtx = False
    context = made(config)
    assert context.set_input_shape("latents", (1, 16, 4))
    return context


def test_an_execution_needs_addresses_and_scratch_memory(simulation: Any, context: Any) -> None:
    stream, (_, memory) = simulation.cuda.cudaStreamCreateWithFlags(1)[1], simulation.cuda.cudaMalloc(4096)
    assert not context.execute_async_v3(int(stream))
    for i, name in enumerate(("latents", "pixels")):
        assert context.set_tensor_address(name, memory + 1024 * i)
    assert not context.execute_async_v3(int(stream))
    with pytest.raises(SimulatorError, match="10 bytes of scratch memory, needs 1000"):
        context.set_device_memory(memory, 10)
    context.set_device_memory(memory + 2048, 1000)
    assert context.execute_async_v3(int(stream))
    simulation.cuda.cudaStreamSynchronize(stream)
    assert simulation.device.executions == ["decode"]
    context.set_device_memory(memory + 1024, 1000)
    assert context.execute_async_v3(int(stream))
    with pytest.raises(SimulatorError, match="overlaps"):
        simulation.cuda.cudaStreamSynchronize(stream)


def test_shapes_and_addresses_that_cannot_be_are_refused(context: Any) -> None:
    assert not context.set_input_shape("latents", (0, 16, 4))
    assert not context.set_input_shape("latents", (16, 4))
    assert not context.set_input_shape("pixels", (1, 16, 16, 3))
    assert not context.set_tensor_address("nothing", 256)
    for address in (0, 100):
        with pytest.raises(SimulatorError, match="null or not a multiple"):
            context.set_tensor_address("latents", address)


def test_a_context_is_enqueued_before_it_is_captured(simulation: Any, context: Any) -> None:
    stream, (_, memory) = simulation.cuda.cudaStreamCreateWithFlags(1)[1], simulation.cuda.cudaMalloc(4096)
    context.set_tensor_address("latents", memory)
    context.set_tensor_address("pixels", memory + 1024)
    context.set_device_memory(memory + 2048, 1000)
    simulation.cuda.cudaStreamBeginCapture(stream, simulation.cuda.cudaStreamCaptureMode(1))
    assert not context.execute_async_v3(int(stream))
    assert simulation.cuda.cudaStreamEndCapture(stream)[0] == cudaError_t.cudaErrorStreamCaptureInvalidated


def test_an_error_that_is_not_fetched_fails_the_next_execution(simulate: Any, tiny: Any) -> None:
    """Which is why the engine fetches it when the device is full."""
    simulation = simulate()
    engine = simulation.engine(tiny.bundle)
    latents = engine.put(np.zeros((1, 16, 4), np.float32))
    assert simulation.cuda.cudaMalloc(2 << 30)[0] == cudaError_t.cudaErrorMemoryAllocation
    with pytest.raises(Exception, match="Cuda failure cudaErrorMemoryAllocation"):
        engine.run("decode", {"latents": latents})


@pytest.mark.parametrize("early", [0, 0.5, 1])
def test_arrays_larger_than_a_block_and_more_than_may_wait_arrive(
    early: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their pinned memory is used again, but not before they are on the device."""
    from far_runtime.engines.tensorrt import device_memory

    monkeypatch.setattr(device_memory, "BLOCK_BYTES", 1 << 10)
    monkeypatch.setattr(device_memory, "MAX_IN_FLIGHT", 8 << 10)
    simulated = SimulatedCuda(early=early)
    memory = ArrayMemory(Cuda(simulated), reuse=True)
    sizes = [1, 300, 0, 5000, 10, 1000, 3000, 0, 20000, 7] * 3
    for _ in range(2):
        arrays = [np.full(size, i, np.int64) for i, size in enumerate(sizes)]
        there = {str(i): memory.staging.put(array)[0] for i, array in enumerate(arrays)}
        back = memory.read(there)
        assert all(np.array_equal(back[str(i)], array) for i, array in enumerate(arrays))
        count, there = len(simulated.allocated), {}
    assert len(simulated.allocated) == count
    memory.close()
    assert simulated.live == {"device": 0, "pinned": 0}


def test_bytes_are_said_in_words() -> None:
    assert (cuda_calls.mib(17), cuda_calls.mib(3 << 20)) == ("17 bytes", "3 MiB")
