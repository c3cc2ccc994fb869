"""Golden cases of FAR-T2I: those of FAR, conditioned on text features from the case's noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from far_export.stages import far_t2i as graphs
from far_runtime.conditioning.text import context_condition
from golden.continuous import Recorder, load_model, run_loop, samples_of, z_errors
from golden.draws import noise, relative_error
from golden.stage_engine import engine_of


def check_far_t2i(
    case: dict[str, Any], expected: dict[str, NDArray[Any]], engine_name: str, folder: Path
) -> dict[str, float]:
    """Relative errors of z at every 16th token (see `z_errors`), of every step's samples and of the final latents.

    The official sampler has constant guidance and no temperature, whatever its arguments say.
    """
    model = load_model(case, folder, "far_t2i")
    config, batch = model.config, case["batch"]
    settings = {"levels": case["levels"], "steps": case["diffusion_steps"], "guidance": case["cfg"], "temperature": 1.0}
    recorder = Recorder(engine_of(graphs.stages(model), engine_name, folder / "bundle"))
    features = noise("context", (batch, config.context_tokens, config.context_width), case["seed"])
    condition = context_condition(recorder, recorder.put(features), range(batch), [None] * batch)
    latents, plan = run_loop("far_t2i", config, settings, recorder, condition, case["seed"])
    return {
        **z_errors(model, recorder, plan, expected),
        "sampled": relative_error(samples_of(recorder, config.channels), expected["sampled"]),
        "latents": relative_error(latents, expected["latents"]),
    }
