"""The table of settings: single values are checked in it, and every face of the program reads it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from far_runtime.cli.generate import generate
from far_runtime.errors import FarError
from far_runtime.sampling.options import SETTINGS, resolve_values, settings_of
from far_runtime.sampling.presets import OFFICIAL
from far_runtime.sampling.systems import SAMPLERS
from model_infos import far_info, mar_info, var_info

MODELS: dict[str, Any] = {"far": far_info(16), "mar": mar_info(4), "var": var_info(64)}


def test_official_values_fit_the_model() -> None:
    assert resolve_values("mar", mar_info(16), {})["iterations"] == 64
    assert resolve_values("mar", mar_info(4), {})["iterations"] == 16  # as many as there are tokens
    assert resolve_values("var", var_info(64), {})["top_k"] == 64
    assert resolve_values("far", far_info(16), {"guidance": None, "start": None})["guidance"] == 3.0


@pytest.mark.parametrize(
    ("system", "name", "value", "resolved"),
    [
        ("far", "guidance", 2, 2.0),
        ("far", "guidance", "2.5", 2.5),
        ("far", "guidance", np.float64(1.5), 1.5),
        ("far", "start", np.int64(20), 20),
        ("mar", "iterations", "3", 3),
        ("mar", "iterations", 3.0, 3),
        ("var", "top_p", 1, 1.0),
        ("var", "more_smooth", True, True),
        ("mar", "guidance_schedule", "constant", "constant"),
        ("far", "steps", "5:2", "5:2"),
    ],
)
def test_values_are_resolved_to_the_type_of_the_setting(system: str, name: str, value: Any, resolved: Any) -> None:
    result = resolve_values(system, MODELS[system], {name: value})[name]
    assert result == resolved and type(result) is SETTINGS[name].type


@pytest.mark.parametrize(
    ("system", "name", "value", "expected"),
    [
        ("far", "start", 1000, "a whole number from 1 to 999, the timestep of the first diffusion step$"),
        ("far", "shared_noise", True, "a whole number from 0 to 16, the levels of the grid; use shared_noise 0, say$"),
        ("mar", "iterations", 2.5, "a whole number from 1 to 16, the tokens of a picture; use iterations 16, say$"),
        ("mar", "iterations", [2], "a whole number from 1 to 16"),
        ("mar", "guidance_schedule", 3, "linear or constant$"),
        ("var", "guidance", float("inf"), "a number of 0 or more; use guidance 1.5, say$"),
        ("var", "top_k", -1, "a whole number from 0 to 64, the tokens of the vocabulary; use top_k 64, say$"),
        ("var", "more_smooth", 1, "true or false$"),
    ],
)
def test_other_values_are_refused(system: str, name: str, value: Any, expected: str) -> None:
    with pytest.raises(FarError, match=rf"^{name} .*: expected {expected}"):
        resolve_values(system, MODELS[system], {name: value})


def test_every_setting_is_an_option_of_the_command_line() -> None:
    options = {parameter.name: parameter for parameter in generate.params}
    assert all(f"--{name.replace('_', '-')}" in options[name].opts for name in SETTINGS)


def test_presets_set_only_what_they_may() -> None:
    for system, sampler in SAMPLERS.items():
        assert OFFICIAL not in sampler.PRESETS
        for settings in sampler.PRESETS.values():
            assert set(settings) <= set(settings_of(system))
            assert {SETTINGS[name].changed_by for name in settings} == {"every preset"}
