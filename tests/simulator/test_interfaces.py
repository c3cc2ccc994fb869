"""What the simulator offers exists in the real libraries, under the same names and with the same arguments."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from simulated_cuda import SimulatedCuda, cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode
from simulated_tensorrt import CLASSES, RTX_CLASSES


def offered(classes: dict[str, tuple[type, ...]]) -> Iterator[tuple[str, str, list[str]]]:
    """Class, member, and names of its arguments (none for properties and values)."""
    for name, kinds in classes.items():
        for kind in kinds:
            for member, value in vars(kind).items():
                if inspect.isfunction(value) and (member == "__init__" or not member.startswith("_")):
                    arguments = [p for p in list(inspect.signature(value).parameters)[1:] if not p.startswith("_")]
                    if member != "__init__" or arguments:
                        yield name, member, arguments
                elif not member.startswith("_"):
                    yield name, member, []


def members(classes: dict[str, tuple[type, ...]]) -> list[Any]:
    return [pytest.param(*one, id=".".join(one[:2])) for one in offered(classes)]


def test_something_is_offered() -> None:
    found = {f"{name}.{member}" for name, member, _ in offered(RTX_CLASSES)}
    assert {"IExecutionContext.execute_async_v3", "ICudaEngine.refittable", "DataType.FLOAT"} <= found
    assert "IExecutionContext.is_stream_capturable" in found
    assert "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy" in found
    assert len(found) > 40


@pytest.mark.parametrize(("name", "member", "arguments"), members(RTX_CLASSES))
def test_tensorrt_rtx_has_it(name: str, member: str, arguments: list[str]) -> None:
    library = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed on this machine")
    real = getattr(getattr(library, name), member)
    if not arguments:
        return
    # Its docstrings carry the signatures, one line for each overload.
    signatures = re.findall(rf"{member}\((self[^\n]*)\) -> ", real.__doc__)
    assert signatures, real.__doc__
    for argument in arguments:
        assert any(re.search(rf"\b{argument}: ", signature) for signature in signatures), (argument, signatures)
    takes = max(len(re.findall(r"\b\w+: ", re.sub(r"\[[^]]*\]", "", one))) - 1 for one in signatures)
    assert takes >= len(arguments), (arguments, signatures)


def stub_classes() -> dict[str, dict[str, set[str] | None]]:
    """From tensorrt-stubs: arguments by method (of all overloads), None for what takes none, by class.

    A few lines of the stubs are no Python (arguments called `in`); they are left out.
    """
    spec = find_spec("tensorrt_bindings")
    places = [Path(place) / "tensorrt.pyi" for place in (spec.submodule_search_locations or [])] if spec else []
    if not places or not places[0].is_file():
        pytest.skip("tensorrt-stubs is not installed on this machine")
    lines = places[0].read_text(encoding="utf-8").splitlines()
    while True:
        try:
            tree = ast.parse("\n".join(lines))
            break
        except SyntaxError as error:
            assert error.lineno is not None
            lines[error.lineno - 1] = ""
    found: dict[str, dict[str, set[str] | None]] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            there = found.setdefault(node.name, {})
            for part in node.body:
                if isinstance(part, ast.FunctionDef):
                    there[part.name] = (there.get(part.name) or set()) | {one.arg for one in part.args.args[1:]}
                elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                    there[part.target.id] = None
    return found


def test_tensorrts_stubs_have_it() -> None:
    classes = stub_classes()
    for name, member, arguments in offered(CLASSES):
        assert member in classes[name], f"{name}.{member}"
        assert set(arguments) <= (classes[name][member] or set()), f"{name}.{member}"


CALLS = [
    name for name in vars(SimulatedCuda) if name.startswith("cuda") and inspect.isfunction(getattr(SimulatedCuda, name))
]


@pytest.mark.parametrize("name", CALLS)
def test_cuda_python_has_the_call(name: str) -> None:
    real = getattr(cuda_python(), name)
    arguments = list(inspect.signature(getattr(SimulatedCuda, name)).parameters)[1:]
    first = (real.__doc__ or "").splitlines()[0]
    signature = re.fullmatch(rf"{name}\((.*)\)", first)
    assert signature, first
    taken = [part.partition(":")[0].split()[-1] for part in signature.group(1).split(", ") if part]
    assert taken == arguments


@pytest.mark.parametrize("kind", [cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode])
def test_cuda_python_has_the_numbers(kind: Any) -> None:
    real = getattr(cuda_python(), kind.__name__)
    assert {one.name: int(one) for one in kind} == {one.name: int(getattr(real, one.name)) for one in kind}
    assert cuda_python().cudaStreamNonBlocking == SimulatedCuda.cudaStreamNonBlocking


def test_cuda_python_answers_without_a_device_as_we_expect() -> None:
    """An error code and None, as tuples; on a machine with a device, a number."""
    error, count = cuda_python().cudaGetDeviceCount()
    assert (error == cuda_python().cudaError_t.cudaSuccess) == isinstance(count, int)
    assert isinstance(cuda_python().cudaGetErrorString(error)[1], bytes)
    assert len(cuda_python().cudaGetLastError()) == 1


def cuda_python() -> Any:
    try:
        return import_module("cuda.bindings.runtime")
    except ImportError:
        pytest.skip("cuda-python is not installed on this machine")
