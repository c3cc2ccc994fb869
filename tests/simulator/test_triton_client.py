"""NVIDIA's client, by the code in docs/triton.md, against a gRPC server over the simulator."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image
from tritonclient import utils
from tritonclient.grpc import service_pb2, service_pb2_grpc

from far_runtime.bundle import open_bundle
from far_runtime.pipeline import Pipeline
from far_runtime.triton.repository import RepositoryOptions, write_repository
from simulated_triton import Server, TritonError

DOCS = (Path(__file__).resolve().parents[2] / "docs" / "triton.md").read_text(encoding="utf-8")
CODES = {TritonError.INVALID_ARG: grpc.StatusCode.INVALID_ARGUMENT, TritonError.INTERNAL: grpc.StatusCode.INTERNAL}


class Service(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Triton's gRPC service, as far as `infer` needs it."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:
        inputs = {}
        for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
            flat = (
                utils.deserialize_bytes_tensor(raw)
                if tensor.datatype == "BYTES"
                else np.frombuffer(raw, utils.triton_to_np_dtype(tensor.datatype))
            )
            inputs[tensor.name] = flat.reshape(tuple(tensor.shape))
        (result,) = self._server.infer(request.model_name, inputs, outputs=[one.name for one in request.outputs])
        if isinstance(result, TritonError):
            context.abort(CODES[result.code()], result.message())
        response = service_pb2.ModelInferResponse(model_name=request.model_name, model_version="1")
        for name, array in result.items():
            output = response.outputs.add()
            output.name, output.datatype = name, utils.np_to_triton_dtype(array.dtype)
            output.shape.extend(array.shape)
            text = array.dtype == np.object_
            response.raw_output_contents.append(utils.serialize_byte_tensor(array).item() if text else array.tobytes())
        return response


@pytest.fixture
def served(tiny: Any, tmp_path: Path) -> Iterator[tuple[Server, str]]:
    """The simulator of a repository with the loop far-emoji, and the address of its service."""
    write_repository(open_bundle(tiny.bundle), tmp_path / "models", RepositoryOptions(name="far-emoji"))
    simulated = Server(tmp_path / "models")
    with simulated.running("far-emoji"):
        server = grpc.server(ThreadPoolExecutor(1))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Service(simulated), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield simulated, f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


def test_the_code_in_the_docs_draws(
    tiny: Any, served: tuple[Server, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    code = code.replace("localhost:8001", served[1]).replace("panda", "lion").replace("ghost", "owl")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/triton.md", "exec"), {})
    with Pipeline.from_bundle(tiny.bundle, "onnxruntime", threads=1) as pipeline:
        expected = pipeline.generate(["lion", "owl"], [5, 5], steps=10, batch_size=2)
    for name, pixels in zip(("lion", "owl"), expected.images, strict=True):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert np.array_equal(np.asarray(image), pixels)


def test_the_curl_line_in_the_docs_is_a_request_that_the_model_takes(served: tuple[Server, str]) -> None:
    (body,) = re.findall(r"/infer -d '(\{.*?\})'", DOCS, re.DOTALL)
    body = json.loads(body.replace("panda", "lion"))
    arrays = {}
    for one in body["inputs"]:
        text = one["datatype"] == "BYTES"
        data = [value.encode() for value in one["data"]] if text else one["data"]
        arrays[one["name"]] = np.array(data, utils.triton_to_np_dtype(one["datatype"])).reshape(one["shape"])
    (response,) = served[0].infer("far-emoji", arrays, outputs=[one["name"] for one in body["outputs"]])
    assert response["PIXELS"].shape == (1, 16, 16, 3)


def test_an_error_reaches_the_client_with_its_code(served: tuple[Server, str]) -> None:
    import tritonclient.grpc as triton

    client = triton.InferenceServerClient(served[1])
    label = triton.InferInput("LABEL", [1, 1], "BYTES")
    label.set_data_from_numpy(np.array([["no such"]], np.object_))
    with pytest.raises(utils.InferenceServerException, match="label 'no such': no class of that name") as caught:
        client.infer("far-emoji", [label])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
