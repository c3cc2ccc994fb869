"""Model repositories of all systems, served by the simulator: the loop draws what `far generate` draws."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from far_runtime.bundle import open_bundle
from far_runtime.images.metadata import PictureMetadata
from far_runtime.pipeline import Pipeline
from far_runtime.triton.config import ServingConfig
from far_runtime.triton.engine import StageFailed, TritonEngine
from far_runtime.triton.repository import RepositoryOptions, write_repository
from simulated_triton import Request, Server, Tensor, TritonError, TritonModelException, seeds, strings

STEPS = {"far": {"steps": 2}, "far_t2i": {"steps": 2}, "mar": {"steps": 2}, "var": {}}


def served(bundle: Path, folder: Path, **options: Any) -> Server:
    write_repository(open_bundle(bundle), folder, RepositoryOptions(name="m", **options))
    return Server(folder)


@pytest.mark.parametrize("engine", ["onnxruntime", "onnxruntime:cuda"])
def test_every_system_draws_the_bits_of_far_generate(system_bundle: Path, tmp_path: Path, engine: str) -> None:
    server = served(system_bundle, tmp_path / "models", engine=engine)
    with Pipeline.from_bundle(system_bundle, "onnxruntime", threads=1) as pipeline:
        manifest = pipeline.bundle.manifest
        text = manifest.system == "far_t2i"
        subjects, settings = (["a red apple", "a lion"] if text else ["3", "1"]), STEPS[manifest.system]
        expected = pipeline.generate(subjects, [5, 6], guidance=[2.0, 3.0], batch_size=2, **settings)
    sampling = strings(*(json.dumps({**settings, "guidance": scale}) for scale in (2.0, 3.0)))
    inputs = {"PROMPT" if text else "LABEL": strings(*subjects), "SEED": seeds(5, 6), "SAMPLING": sampling}
    with server.running("m"):
        (batched,) = server.infer("m", inputs)
        apart = server.infer("m", *({name: array[i : i + 1] for name, array in inputs.items()} for i in range(2)))
    assert np.array_equal(batched["PIXELS"], expected.images)
    assert np.array_equal(np.concatenate([one["PIXELS"] for one in apart]), expected.images)
    metadata = PictureMetadata.from_dict(json.loads(batched["SETTINGS"][1, 0]))
    assert (metadata.seed, metadata.engine, metadata.bundle) == (6, f"triton:{engine}", manifest.id)
    assert metadata.sampling == expected.settings[1].sampling
    assert not server.log


def test_tensors_may_stay_on_the_gpu(system_bundle: Path, tmp_path: Path) -> None:
    manifest = open_bundle(system_bundle).manifest
    subject = {"PROMPT": strings("lion")} if manifest.system == "far_t2i" else {"LABEL": strings("1")}
    inputs = {**subject, "SEED": seeds(5), "SAMPLING": strings(json.dumps({**STEPS[manifest.system], "guidance": 2}))}
    pictures, moved = [], []
    for tensors in ("host", "device"):
        serving = ServingConfig(tensors=tensors)
        server = served(system_bundle, tmp_path / tensors, engine="onnxruntime:cuda", serving=serving)
        with server.running("m"):
            server.infer("m", inputs)
            before = server.moved
            pictures.append(server.infer("m", inputs)[0]["PIXELS"])
            moved.append(server.moved - before)
    assert np.abs(pictures[0].astype(int) - pictures[1]).max() <= 1
    assert moved[1] < moved[0]


def test_the_loop_calls_every_stage_that_drawing_needs(system_bundle: Path, tmp_path: Path) -> None:
    server = served(system_bundle, tmp_path / "models")
    manifest = open_bundle(system_bundle).manifest
    subject = {"PROMPT": strings("lion")} if manifest.system == "far_t2i" else {"LABEL": strings("1")}
    settings = {**STEPS[manifest.system]}
    with server.running("m"):
        server.infer("m", {**subject, "SAMPLING": strings(json.dumps(settings))})
        if manifest.system == "var":
            server.infer("m", {**subject, "SAMPLING": strings('{"more_smooth": true}')})
    called = {name for name, _ in server.calls}
    unused = set(server.models) - called - {"m"}
    assert unused <= {"m_place"}  # for editing; MAR's own loop calls it
    assert ("m_place" in called) == (manifest.system == "mar")


def test_requests_with_the_same_settings_share_a_batch(tiny: Any, tmp_path: Path) -> None:
    server = served(tiny.bundle, tmp_path / "models")
    few, more = strings('{"steps": 2}'), strings('{"steps": 3}')
    with server.running("m"):
        inputs = [{"LABEL": strings(str(i)), "SEED": seeds(i), "SAMPLING": more if i == 1 else few} for i in range(4)]
        batched = server.infer("m", *inputs)
        alone = [server.infer("m", one)[0] for one in inputs]
    batches = [shapes["state"][0] for name, shapes in server.calls if name == "m_denoise"]
    levels = open_bundle(tiny.bundle).manifest.default_settings["levels"]
    assert batches[: 2 * len(levels)] == [3] * 2 * len(levels)
    assert batches[2 * len(levels) : 5 * len(levels)] == [1] * 3 * len(levels)
    for one, other in zip(batched, alone, strict=True):
        assert np.abs(one["PIXELS"].astype(int) - other["PIXELS"]).max() <= 1


def test_pictures_of_a_request_keep_their_order_whatever_their_settings(tiny: Any, tmp_path: Path) -> None:
    server = served(tiny.bundle, tmp_path / "models")
    sampling = strings('{"steps": 2}', '{"steps": 3}', '{"steps": 2}')
    with server.running("m"):
        (response,) = server.infer("m", {"LABEL": strings("1", "2", "3"), "SEED": seeds(7, 8, 9), "SAMPLING": sampling})
    settings = [json.loads(text) for text in response["SETTINGS"][:, 0]]
    assert [(one["label"], one["seed"], one["sampling"]["steps"]) for one in settings] == [
        (1, 7, 2), (2, 8, 3), (3, 9, 2)
    ]  # fmt: skip


BAD = [
    ({"LABEL": strings("no such")}, r"label 'no such': no class of that name.*use label with"),
    ({"LABEL": strings("99")}, "label 99: out of range"),
    ({"LABEL": np.array([[b"\xff"]], np.object_)}, "LABEL: not UTF-8"),
    ({"LABEL": strings("x" * 1001)}, "LABEL: 1001 characters"),
    ({"SAMPLING": strings("{")}, "SAMPLING: not JSON"),
    ({"SAMPLING": strings("[1]")}, "SAMPLING: expected an object"),
    ({"SAMPLING": strings('{"steps": 0}')}, "steps 0"),
    ({"SAMPLING": strings('{"top_k": 3}')}, "top_k: a far model has no such setting"),
    ({"SAMPLING": strings('{"guidance": "much"}')}, "much"),
    ({"SAMPLING": strings('{"guidance": NaN}')}, "guidance nan"),
    ({"SAMPLING": strings("[" * 9999)}, "SAMPLING: not JSON"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_a_bad_request_fails_alone(tiny: Any, tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    server = served(tiny.bundle, tmp_path / "models")
    good = {"LABEL": strings("1"), "SEED": seeds(5), "SAMPLING": strings('{"steps": 2}')}
    with server.running("m"):
        first, error, last = server.infer("m", good, {**good, **wrong}, good)
    assert isinstance(error, TritonError)
    assert error.code() == TritonError.INVALID_ARG
    assert re.search(message, error.message()), error.message()
    assert "--" not in error.message()
    assert np.array_equal(first["PIXELS"], last["PIXELS"])


def test_a_stage_that_fails_is_the_servers_fault_and_logged(tiny: Any, tmp_path: Path) -> None:
    server = served(tiny.bundle, tmp_path / "models")
    server.fail["m_decode"] = "out of memory"
    with server.running("m"):
        errors = server.infer("m", *({"LABEL": strings(str(i))} for i in range(2)))
        assert [(one.code(), one.message()) for one in errors] == [
            (TritonError.INTERNAL, "not drawn: m_decode: out of memory")
        ] * 2
        assert server.log
        server.fail.clear()
        (response,) = server.infer("m", {"LABEL": strings("1")}, outputs=["PIXELS"])
    assert list(response) == ["PIXELS"]


def test_a_batch_that_nobody_waits_for_is_given_up(tiny: Any, tmp_path: Path) -> None:
    server = served(tiny.bundle, tmp_path / "models")
    with server.running("m"):
        gone = [Request({"LABEL": strings("1")}, ["PIXELS"], cancelled=True) for _ in range(2)]
        errors = server.infer_requests("m", gone)
        calls = len(server.calls)
        one_left = [
            Request({"LABEL": strings("1")}, ["PIXELS"], cancelled=True), Request({"LABEL": strings("2")}, ["PIXELS"])
        ]  # fmt: skip
        responses = server.infer_requests("m", one_left)
    assert [one.code() for one in errors] == [TritonError.CANCELLED] * 2
    assert len(server.calls) - calls > calls
    assert responses[1]["PIXELS"].shape == (1, 16, 16, 3)


def test_without_a_seed_every_picture_has_its_own(tiny: Any, tmp_path: Path) -> None:
    server = served(tiny.bundle, tmp_path / "models")
    with server.running("m"):
        (response,) = server.infer("m", {"LABEL": strings("1", "1")})
        drawn = [json.loads(text)["seed"] for text in response["SETTINGS"][:, 0]]
        (again,) = server.infer("m", {"LABEL": strings("1", "1"), "SEED": seeds(*drawn)})
    assert drawn[0] != drawn[1]
    assert np.array_equal(again["PIXELS"], response["PIXELS"])


def test_a_prompt_that_is_cut_comes_with_a_warning(tiny: Any, tmp_path: Path) -> None:
    server = served(tiny.t2i_bundle, tmp_path / "models")
    with server.running("m"):
        inputs = {"PROMPT": strings("a red apple and a lion of the city street"), "NEGATIVE": strings("green")}
        (response,) = server.infer("m", {**inputs, "SAMPLING": strings('{"steps": 2}')})
    settings = json.loads(response["SETTINGS"][0, 0])
    assert settings["negative"] == "green"
    assert "the rest is cut" in settings["warnings"][0]


@pytest.mark.parametrize("file", ["manifest.json", "tokenizer.json"])
def test_a_damaged_loop_is_not_loaded(tiny: Any, tmp_path: Path, file: str) -> None:
    server = served(tiny.t2i_bundle, tmp_path / "models")
    path = tmp_path / "models" / "m" / "1" / file
    path.write_bytes(path.read_bytes().replace(b"a", b"b", 1))
    with pytest.raises(TritonModelException, match=file), server.running("m"):
        pass


def test_what_is_put_is_a_copy_and_what_lies_on_a_gpu_is_not_read(tiny: Any) -> None:
    engine = TritonEngine(open_bundle(tiny.bundle), None, "m", "triton:onnxruntime:cuda", on_device=True)
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    held = engine.put(array)
    array[:] = 0
    assert held.flags.c_contiguous
    assert engine.get(held).tolist() == [[0, 3], [1, 4], [2, 5]]
    on_gpu = Tensor("hidden", held)
    on_gpu.gpu = True
    with pytest.raises(StageFailed, match="hidden: is on a GPU"):
        engine.get(on_gpu)
