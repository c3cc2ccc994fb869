"""`far verify` as a user runs it: exit codes, the line on standard error, JSON and the page."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from far_runtime.bundle import manifest_checksum
from far_runtime.cli.main import main

if TYPE_CHECKING:
    from conftest import Tiny


def far(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a far command."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def verify(capsys: pytest.CaptureFixture[str], bundle: Path, checkpoint: Path, *more: object) -> tuple[int, str, str]:
    common = ("--checkpoint", checkpoint, "--engine", "onnxruntime", "--threads", 1)
    return far(capsys, "verify", bundle, *common, *more)


@pytest.fixture(params=["unmasked", "masked", "mar"])
def case(request: pytest.FixtureRequest, tiny: Tiny) -> tuple[Path, Path]:
    if request.param == "mar":
        return tiny.mar_bundle, tiny.mar
    return (tiny.masked_bundle, tiny.masked) if request.param == "masked" else (tiny.bundle, tiny.safetensors)


def test_an_honest_bundle_passes_and_is_reported(
    case: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, json_file = tmp_path / "verify.html", tmp_path / "verify.json"
    code, out, err = verify(
        capsys, *case, "--label", 3, "--label", 9, "--engine", "onnxruntime", "--html", page, "--json", json_file
    )
    assert (code, err) == (0, "")
    assert out.splitlines()[-2].startswith("passed: worst stage error ")
    assert out.splitlines()[-1] == f"written: {json_file}, {page}"
    assert "FAIL" not in out
    assert all(len(line.rstrip()) <= 80 for line in out.splitlines()[:-2])  # the table in a narrow window
    figures = json.loads(json_file.read_text())
    check_schema(figures)
    assert figures["passed"] and [(p["label"], p["seed"]) for p in figures["pictures"]] == [(3, 0), (9, 0)]
    check_page(page.read_text(encoding="utf-8"), figures)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["verify.html", "verify.json"]  # nothing left aside


def test_other_weights_of_the_same_size_fail(
    case: tuple[Path, Path], tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, checkpoint = case
    pth = tiny.far if checkpoint == tiny.safetensors else checkpoint
    page, json_file = tmp_path / "verify.html", tmp_path / "verify.json"
    code, out, err = verify(capsys, bundle, pth, "--weights", "model", "--html", page, "--json", json_file)
    assert code == 1
    assert re.fullmatch(
        r"error: transformer at (level 0|iteration 1) \(step 1 of \d\): relative error \S+, tolerance 1e-04 "
        r"\(and \d+ more\)\n",
        err,
    )
    assert "FAILED: worst stage error" in out and "FAIL" in out
    figures = json.loads(json_file.read_text())
    check_schema(figures)
    assert not figures["passed"]
    check_page(page.read_text(encoding="utf-8"), figures)


def test_the_recorded_weights_are_the_default(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bundle of model_ema that claims to be one of model."""
    from far_runtime.bundle import open_bundle, write_manifest

    bundle = tmp_path / "bundle"
    shutil.copytree(tiny.bundle, bundle)
    manifest = open_bundle(bundle).manifest
    source = {**manifest.source, "checkpoint": {"file": tiny.far.name, "weights": "model"}}
    write_manifest(bundle, replace(manifest, source=source))
    assert verify(capsys, bundle, tiny.far)[0] == 1
    assert verify(capsys, bundle, tiny.far, "--weights", "model_ema")[0] == 0


def test_json_to_standard_output_is_all_that_is_there(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = verify(
        capsys, tiny.bundle, tiny.safetensors, "--json", "-", "--steps", "1:2", "--levels", "0,3", "--guidance", 1,
        "--label", "owl", "--count", 2, "--seed", 5,
    )  # fmt: skip
    assert code == 0
    figures = json.loads(out)
    check_schema(figures)
    settings = {"levels": [0, 3], "steps": [1, 2], "guidance": 1, "temperature": 1}
    assert figures["settings"] == settings | {"solver": "ddpm", "start": None, "guidance_floor": 1, "shared_noise": 0}
    assert [(step["step"], step["inner"], step["guidance"]) for step in figures["plan"]] == [
        ("level 0", 1, 1), ("level 3", 2, 1),
    ]  # fmt: skip
    assert [(p["label"], p["name"], p["seed"]) for p in figures["pictures"]] == [(9, "owl", 5), (9, "owl", 6)]
    assert "passed: " in err


def test_nan_in_one_graph_is_named(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bundle of the masked model has one transformer graph per level; the second one's gives NaN in one place."""
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny.masked_bundle, bundle)
    put_nan(bundle, "transformer", level=2)
    code, _, err = verify(
        capsys, bundle, tiny.masked, "--vae", tiny.vae, "--engine", "onnxruntime", "--json", tmp_path / "verify.json"
    )
    assert code == 1
    assert err.startswith(
        "error: transformer at level 2 (step 2 of 2): NaN or Inf: 1 values of onnxruntime:cpu: the first "
    )
    assert "is tensor condition (FP32) of node" in err
    figures = json.loads((tmp_path / "verify.json").read_text())
    check_schema(figures)
    bad = [r for r in figures["stages"] if not r["passed"]]
    assert [(r["stage"], r["at"], r["error"], r["nonfinite"]) for r in bad] == [("transformer", "level 2", None, 1)]
    assert [result["passed"] for result in figures["loop"]] == [True, False]
    assert figures["loop"][1]["first_nonfinite"] == 0


def put_nan(bundle: Path, stage: str, level: int) -> None:
    """Make one entry of a stage's output NaN, in the graph of one level, and record the graph's new checksum."""
    import onnx

    from far_runtime.bundle import open_bundle, record_of, write_manifest

    manifest = open_bundle(bundle).manifest
    graph = next(g for g in manifest.graphs if g.stage == stage and g.constants["level"] == level)
    path = bundle / graph.file
    model = onnx.load(path, load_external_data=False)
    (output,) = model.graph.output
    for node in model.graph.node:
        for i, name in enumerate(node.output):
            if name == output.name:
                node.output[i] = "honest"
    shape = graph.outputs[0].shape[1:]
    mask = np.zeros(shape, np.float32)
    mask.flat[0] = np.nan
    first = np.zeros((1, *mask.shape), np.float32)
    first[0] = mask
    rows = onnx.helper.make_node("Slice", ["honest", "zero", "one", "zero"], ["first"])
    rest = onnx.helper.make_node("Slice", ["honest", "one", "end", "zero"], ["rest"])
    spoiled = onnx.helper.make_node("Add", ["first", "mask"], ["spoiled"])
    joined = onnx.helper.make_node("Concat", ["spoiled", "rest"], [output.name], axis=0)
    model.graph.node.extend([rows, rest, spoiled, joined])
    for name, value in (("zero", [0]), ("one", [1]), ("end", [2**31])):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, np.int64), name))
    model.graph.initializer.append(onnx.numpy_helper.from_array(first, "mask"))
    onnx.save(model, path)
    write_manifest(bundle, replace(manifest, files={**manifest.files, graph.file: record_of(path)}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label", "11"], "label 11: out of range"),
        (["--label", "unicorn"], "label 'unicorn': no class of that name"),
        (["--guidance", "-1"], "--guidance -1.0: expected a number of 0 or more"),
        (["--iterations", "3"], "--iterations: a far model has no such setting; it takes --levels, --steps"),
        (["--prompt", "fog"], "draws from class labels, not from text; use --label in place of --prompt"),
        (["--levels", "0,3,2"], "levels must rise"),
        (["--steps", "0"], "expected 1 to 1000"),
        (["--seed", "-1"], "seed -1: expected 0 to"),
        (["--engine", "abacus"], "engine 'abacus': unknown"),
        (["--config", "wings=2"], "--config wings: unknown setting"),
        (["--vae", "{far}"], "is a far checkpoint; expected klvae"),
        (["--vae", "{folder}/none.ckpt"], "no such file"),
        (["--html", "{far}/verify.html"], "--html"),
        (["--json", "{folder}"], "--json"),
        (["--json", "{folder}/x", "--html", "{folder}/a/../x"], "--html and --json would both write it"),
        (["--json", "{folder}/far.safetensors"], "--json would replace the file given with --checkpoint"),
        (["--count", "0"], "--count"),
        (["--tolerance-scale", "0"], "--tolerance-scale"),
    ],
)
def test_bad_input_is_one_line(
    tiny: Tiny, arguments: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [text.format(far=tiny.far, folder=tiny.folder) for text in arguments]
    code, out, err = verify(capsys, tiny.bundle, tiny.safetensors, *filled)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_a_checkpoint_of_other_sizes_is_refused(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from argparse import Namespace

    import torch

    from far_models.checkpoint.load import load_checkpoint
    from far_models.far import FAR

    config = replace(load_checkpoint(tiny.safetensors).model.config, head_depth=3, classes=12)
    path = tmp_path / "other.pth"
    args = Namespace(mask=False, encoder_heads=2, decoder_heads=2, prediction="v")
    torch.save({"model_ema": FAR(config).state_dict(), "args": args}, path)
    code, out, err = verify(capsys, tiny.bundle, path, "--vae", tiny.vae)
    assert (code, out) == (2, "")
    assert "head_depth is 3, the bundle has 2" in err and "classes is 12, the bundle has 10" in err


def test_the_masked_checkpoint_is_not_the_unmasked_one(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = verify(capsys, tiny.bundle, tiny.masked)
    assert code == 2 and "masked is True, the bundle has False" in err


def test_a_vae_that_is_not_beside_the_checkpoint_is_asked_for(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / tiny.safetensors.name
    shutil.copy(tiny.safetensors, alone)
    code, _, err = verify(capsys, tiny.bundle, alone)
    assert code == 2 and f"{tmp_path / tiny.vae.name}: no such file" in err and "--vae" in err
    assert verify(capsys, tiny.bundle, alone, "--vae", tiny.vae, "--steps", 1)[0] == 0


def test_a_changed_bundle_is_refused(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny.bundle, bundle)
    graph = bundle / "denoise.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    code, _, err = verify(capsys, bundle, tiny.safetensors)
    assert code == 2 and "denoise.onnx" in err and "changed since export" in err


NUMBER, OPTIONAL = (int, float), (int, float, type(None))
STAGE: dict[str, Any] = {
    "stage": str, "output": str, "graph": str, "step": (int, type(None)), "at": str, "calls": int,
    "tolerance": float, "error": OPTIONAL, "worst_call": int, "relative_error": OPTIONAL, "cosine": NUMBER,
    "max_abs": NUMBER, "nonfinite": int, "nonfinite_reference": int, "first_nonfinite": (int, type(None)),
    "first_nonfinite_reference": (int, type(None)), "passed": bool,
}  # fmt: skip
LOOP: dict[str, Any] = {
    "step": int, "at": str, "inner": int, "limit": float, "error": OPTIONAL, "cosine": NUMBER,
    "max_abs": NUMBER, "nonfinite": int, "nonfinite_reference": int, "first_nonfinite": (int, type(None)),
    "passed": bool,
}  # fmt: skip
PICTURE: dict[str, Any] = {
    "label": int, "name": str, "seed": int, "limit": float, "psnr": OPTIONAL, "max_difference": int, "passed": bool
}  # fmt: skip
WHOLE: dict[str, Any] = {
    "format": int, "passed": bool, "failures": list, "bundle": dict, "reference": dict, "candidate": dict,
    "settings": dict, "plan": list, "limits": dict, "stages": list, "loop": list, "pictures": list, "ranges": dict,
    "latents_error": OPTIONAL, "worst_psnr": OPTIONAL,
}  # fmt: skip


def check_schema(figures: dict[str, Any]) -> None:
    """The figures that scripts may rely on, with their types, and nothing else."""
    check_types(figures, WHOLE)
    assert figures["format"] == 3
    assert figures["passed"] is (figures["failures"] == [])
    check_types(figures["bundle"], dict.fromkeys(("name", "id", "system", "precision", "created_by"), str))
    for side in ("reference", "candidate"):
        check_types(figures[side], {"name": str, "version": str})
        assert figures[side]["version"]
    mar = figures["bundle"]["system"] == "mar"
    steps = (int, list)  # one number where all are the same
    of_system = {"iterations": int, "guidance_schedule": str} if mar else {"levels": list, "shared_noise": int}
    scales = dict.fromkeys(("guidance", "guidance_floor", "temperature"), float)
    check_types(figures["settings"], {**of_system, "steps": steps, "solver": str, "start": NoneType, **scales})
    tokens = {"tokens": int} if mar else {}
    for step in figures["plan"]:
        types = {"step": str, "inner": int, "guidance": NUMBER, "temperature": float, "visible": int, **tokens}
        check_types(step, types)
    check_types(figures["limits"], {"tolerance_scale": float, "stages": dict, "latents": float, "psnr": float})
    for results, types in ((figures["stages"], STAGE), (figures["loop"], LOOP), (figures["pictures"], PICTURE)):
        assert results
        for result in results:
            check_types(result, types)
    assert [result["at"] for result in figures["loop"]] == [step["step"] for step in figures["plan"]]
    assert set(figures["limits"]["stages"]) == {result["graph"] for result in figures["stages"]}


def check_types(figures: dict[str, Any], types: dict[str, Any]) -> None:
    assert set(figures) == set(types)
    for name, expected in types.items():
        assert isinstance(figures[name], expected), name
        assert expected is not int or not isinstance(figures[name], bool), name


VOID = {"meta", "img"}


class Page(HTMLParser):
    """The elements of a page; fails on a tag that is not closed where it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def check_page(html: str, figures: dict[str, Any]) -> None:
    """One file that loads nothing, with all pictures, figures and the verdict in it."""
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == []
    tags = [tag for tag, _ in page.elements]
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "a"} & set(tags)
    assert "://" not in html and "@import" not in html and "url(" not in html and "javascript:" not in html
    assert not any(name.startswith("on") or name in ("href", "srcset") for _, a in page.elements for name in a)
    sources = [attributes["src"] or "" for _, attributes in page.elements if "src" in attributes]
    assert len(sources) == 3 * len(figures["pictures"])
    for i, picture in enumerate(figures["pictures"]):
        reference, candidate, difference = (decoded(source) for source in sources[3 * i : 3 * i + 3])
        apart = np.abs(candidate.astype(int) - reference)
        assert apart.max() == picture["max_difference"]
        factor = int(re.search(r"difference × (\d+)", page.text)[1])  # type: ignore[index]
        np.testing.assert_array_equal(difference, np.clip(apart * factor, 0, 255))
        assert (picture["psnr"] is None) == (apart.max() == 0)
    assert all(attributes.get("alt") for tag, attributes in page.elements if tag == "img")
    assert ("PASSED" in page.text) is figures["passed"] and ("FAILED" in page.text) is not figures["passed"]
    for sentence in figures["failures"][:10]:
        assert sentence in page.text
    rows = tags.count("tr") - 1
    assert rows == len(figures["stages"]) + len(figures["loop"])
    stages = {result["stage"] for result in figures["stages"] if result["step"] is not None}
    assert tags.count("title") == 1 + (len(stages) + 1) * len(figures["loop"])  # of the page, and of every marker
    assert figures["bundle"]["id"] in page.text and figures["candidate"]["version"] in page.text


def decoded(source: str) -> np.ndarray:
    head, data = source.split(",", 1)
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def test_settings_of_the_export_are_remembered(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bare state dict shows neither head count nor variant: what --config said at the export is in the manifest."""
    import torch

    state = torch.load(tiny.far, weights_only=False)
    torch.save({"model_ema": state["model_ema"]}, tmp_path / "bare.pth")
    bundle = shutil.copytree(tiny.bundle, tmp_path / "bundle")
    code, _, err = verify(capsys, bundle, tmp_path / "bare.pth", "--vae", tiny.vae)
    assert code == 2 and "--config encoder_heads=N" in err
    code, _, err = verify(capsys, bundle, tmp_path / "bare.pth", "--vae", tiny.vae, "--config", "heads=2")
    assert code == 2 and "--config masked=true or masked=false" in err
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["source"]["config"] = {"heads": 2, "prediction": "v", "masked": False}
    manifest["sha256"] = manifest_checksum(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    code, _, err = verify(capsys, bundle, tmp_path / "bare.pth", "--vae", tiny.vae, "--count", 1)
    assert (code, err) == (0, "")


def test_weights_are_chosen_only_where_there_is_a_choice(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recorded name is no demand on a file with a single set; --weights is."""
    import torch

    state = torch.load(tiny.mar, weights_only=False)
    flat = tmp_path / "flat.pth"
    torch.save(state["model_ema"], flat)
    sizes = ("--vae", tiny.vae, "--config", "heads=2", "--config", "prediction=v", "--count", 1, "--steps", 1)
    code, _, err = verify(capsys, tiny.mar_bundle, flat, *sizes)
    assert (code, err) == (0, "")
    code, out, err = verify(capsys, tiny.mar_bundle, flat, *sizes, "--weights", "model_ema")
    assert (code, out) == (2, "")
    assert err == "error: --weights model_ema: flat.pth has a single set of weights; leave --weights out\n"
