"""The loop as a model of Triton's Python backend; imported within the server alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import triton_python_backend_utils as utils

from far_runtime.bundle import Bundle, read_manifest, record_of
from far_runtime.conditioning.cache import LIMIT
from far_runtime.conditioning.subjects import takes_text
from far_runtime.conditioning.text import TOKENIZER, load_tokenizer
from far_runtime.errors import FarError
from far_runtime.pipeline import Pipeline
from far_runtime.triton.engine import TritonEngine
from far_runtime.triton.handler import RequestHandler


class TritonPythonModel:
    """Draws pictures by the same loop as all engines, through the models of the stages."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle beside model.py.

        Raises TritonModelException, with which the server refuses to load the model, if the bundle is damaged or a
        library is missing.
        """
        parameters = {
            key: value["string_value"] for key, value in json.loads(args["model_config"])["parameters"].items()
        }
        try:
            bundle = open_loop(Path(args["model_repository"]) / args["model_version"])
            on_device = parameters["TENSORS"] == "device"
            engine = TritonEngine(bundle, utils, parameters["STAGES"], f"triton:{parameters['ENGINE']}", on_device)
            self._pipeline = Pipeline(bundle, engine, cache_bytes=0 if on_device else LIMIT)
        except FarError as error:
            raise utils.TritonModelException(str(error)) from error
        self._handler = RequestHandler(self._pipeline, utils)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """The responses to the requests of a batch."""
        return self._handler.answer(requests)

    def finalize(self) -> None:
        """Called when the server unloads the model."""
        self._pipeline.close()


def open_loop(folder: Path) -> Bundle:
    """The bundle in a version folder, which has the manifest and the tokenizer but no graphs.

    Raises FarError if a file has changed since the export, or if the library that reads prompts is missing.
    """
    manifest = read_manifest(folder)
    if takes_text(manifest) and manifest.has_stage("text"):
        if (folder / TOKENIZER).is_file() and record_of(folder / TOKENIZER) != manifest.files.get(TOKENIZER):
            raise FarError(f"{folder / TOKENIZER}: changed since export; write the model repository again")
        load_tokenizer(folder)
    return Bundle(folder, manifest)
