"""Solvers against exact answers: a head that knows its distribution, diffusers' schedulers, and the official update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from far_runtime.errors import FarError
from far_runtime.pipeline import Pipeline
from far_runtime.sampling.base import Step
from far_runtime.sampling.noise import SeedNoise
from far_runtime.sampling.noise_schedule import TRAIN_STEPS, cosine_alphas_cumprod
from far_runtime.sampling.reverse_diffusion import diffuse
from far_runtime.sampling.settings import resolve_plan
from far_runtime.sampling.solvers import COEFFICIENTS, ODE_SOLVERS, SOLVERS, STARTS, Diffusion, trailing_timesteps

ALPHAS = cosine_alphas_cumprod()
WEIGHTS, MEANS, DEVIATIONS = np.array([0.3, 0.5, 0.2]), np.array([-1.5, 0.2, 1.8]), np.array([0.5, 0.4, 0.6])
MEAN = float(WEIGHTS @ MEANS)
DEVIATION = float(np.sqrt(WEIGHTS @ (DEVIATIONS**2 + (MEANS - MEAN) ** 2)))
DISTINCT = {"epsilon": 949, "v": TRAIN_STEPS - 1}
"""Starts that leave 950 and 1000 timesteps, which many numbers of steps divide."""


class MixtureHead:
    """A denoise stage whose network knows the score of a mixture of three Gaussians. It computes in `dtype`, and its
    outputs are off by `error` times a fixed pattern."""

    name = "mixture"

    def __init__(
        self, prediction: str, weights: Any = WEIGHTS, means: Any = MEANS, deviations: Any = DEVIATIONS,
        dtype: Any = np.float64, error: float = 0.0,
    ) -> None:  # fmt: skip
        self.prediction, self.mixture, self.dtype, self.error = prediction, (weights, means, deviations), dtype, error

    def put(self, array: NDArray[Any]) -> NDArray[Any]:
        return array.astype(self.dtype)

    def get(self, array: NDArray[Any]) -> NDArray[Any]:
        return array

    def close(self) -> None:
        pass

    def output(self, x: NDArray[Any], timestep: int) -> NDArray[Any]:
        """epsilon = -sigma grad log p(x), or v = alpha epsilon - sigma x0."""
        weights, means, deviations = self.mixture
        alpha, sigma = np.sqrt(ALPHAS[timestep]), np.sqrt(1 - ALPHAS[timestep])
        variance = alpha**2 * deviations**2 + sigma**2
        shift = x[..., None].astype(np.float64) - alpha * means
        log_share = np.log(weights) - 0.5 * np.log(variance) - shift**2 / (2 * variance)
        share = np.exp(log_share - log_share.max(axis=-1, keepdims=True))
        share /= share.sum(axis=-1, keepdims=True)
        found = sigma * (share * shift / variance).sum(axis=-1)
        if self.prediction == "v":
            found = alpha * found - sigma * (share * (means + alpha * deviations**2 / variance * shift)).sum(axis=-1)
        return (found + self.error * np.cos(7 * timestep + np.arange(x.size).reshape(x.shape))).astype(self.dtype)

    def run(self, stage: str, inputs: Mapping[str, Any], constants: Any = None) -> dict[str, NDArray[Any]]:
        assert stage == "denoise"
        c = dict(zip(COEFFICIENTS, inputs["coefficients"], strict=True))
        state, output = inputs["state"], self.output(inputs["state"], int(inputs["timestep"][0]))
        deviation = np.exp(0.5 * c["log_posterior"])  # the network's variance values are -1
        moved = c["state"] * state + c["output"] * output + c["history"] * inputs["history"]
        predicted = c["x0_state"] * state + c["x0_output"] * output
        return {"next_state": moved + c["noise"] * deviation * inputs["noise"], "next_history": predicted}


def sample(head: MixtureHead, diffusion: Diffusion, count: int = 400) -> NDArray[np.float64]:
    """`count` numbers drawn by the project's own loop, with the same noise each time."""
    step = Step(0, "level", 0, diffusion.steps, 1.0, {}, (), diffusion=diffusion)
    drawn = diffuse(head, np.zeros((1, count, 1)), step, SeedNoise([5]), (count, 1), head.prediction)
    return drawn.reshape(-1).astype(np.float64)


def test_tokens_that_share_their_noise_draw_the_same() -> None:
    head, diffusion = MixtureHead("v"), Diffusion(20, "ddpm")
    step = Step(0, "level", 0, diffusion.steps, 1.0, {}, (), diffusion=diffusion, shared=True)
    noise = SeedNoise([5, 6])
    drawn = diffuse(head, np.zeros((2, 9, 1)), step, noise, (9, 1), head.prediction)
    alone = diffuse(head, np.zeros((2, 1, 1)), step, noise, (1, 1), head.prediction)
    assert drawn.shape == (2, 9, 1) and drawn[0, 0] != drawn[1, 0]
    assert np.allclose(drawn, np.broadcast_to(alone, drawn.shape), rtol=1e-5)


def rms(a: NDArray[np.float64], b: NDArray[np.float64] | float = 0.0) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2)))


def slope(steps: list[int], errors: list[float]) -> float:
    """Of log error over log steps, by least squares, sign turned: the order of convergence."""
    return float(-np.polyfit(np.log(steps), np.log(errors), 1)[0])


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize(("solver", "order"), [("ddim", 1.0), ("dpmpp-2m", 2.0)])
def test_order_of_convergence(solver: str, order: float, prediction: str) -> None:
    """Errors of single samples against a solution that visits every timestep."""
    head, start = MixtureHead(prediction), DISTINCT[prediction]
    reference = sample(head, Diffusion(start + 1, "dpmpp-2m", start))
    steps = [10, 19, 38, 50, 95] if prediction == "epsilon" else [10, 20, 25, 50, 100]
    errors = [rms(sample(head, Diffusion(number, solver, start)), reference) for number in steps]
    assert errors == sorted(errors, reverse=True)
    assert slope(steps, errors) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_ode_solvers_agree_where_they_visit_every_timestep(prediction: str) -> None:
    """The reference of the test above is no own child of dpmpp-2m: ddim comes to the same within its own error."""
    head, start = MixtureHead(prediction), DISTINCT[prediction]
    fine = [sample(head, Diffusion(start + 1, solver, start)) for solver in ("ddim", "dpmpp-2m")]
    assert rms(*fine) < 2e-3 * DEVIATION


@pytest.mark.parametrize("solver", ["ddim", "dpmpp-2m"])
def test_a_gaussian_is_solved_as_on_paper(solver: str) -> None:
    """The probability flow of N(m, s^2) in closed form: (x_t - alpha_t m) / sqrt(alpha_t^2 s^2 + sigma_t^2) does not
    change with t."""
    mean, deviation = 0.7, 0.45
    head = MixtureHead("v", np.ones(1), np.array([mean]), np.array([deviation]))
    noise = SeedNoise([5]).start(0, 400, 1).reshape(-1)
    alpha, sigma = np.sqrt(ALPHAS[-1]), np.sqrt(1 - ALPHAS[-1])
    exact = mean + deviation * (noise - alpha * mean) / np.sqrt(alpha**2 * deviation**2 + sigma**2)
    assert rms(sample(head, Diffusion(500, solver)), exact) < {"ddim": 4e-3, "dpmpp-2m": 2e-4}[solver]


def moments(x: NDArray[np.float64]) -> tuple[float, float, float]:
    """Mean, deviation, and the third central moment in units of the deviation."""
    return float(x.mean()), float(x.std()), float(((x - x.mean()) ** 3).mean() / x.std() ** 3)


SKEW = float(WEIGHTS @ ((MEANS - MEAN) ** 3 + 3 * (MEANS - MEAN) * DEVIATIONS**2)) / DEVIATION**3


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize(("solver", "steps"), [("ddpm", 100), ("ddim", 100), ("dpmpp-2m", 20), ("dpmpp-2m-sde", 40)])
def test_samples_have_the_moments_of_the_distribution(solver: str, steps: int, prediction: str) -> None:
    """40,000 samples: the mean's own error is 0.006, of a deviation of 1.3."""
    mean, deviation, skew = moments(sample(MixtureHead(prediction), Diffusion(steps, solver), 40_000))
    assert mean == pytest.approx(MEAN, abs=0.03)
    assert deviation == pytest.approx(DEVIATION, rel=0.02)
    assert skew == pytest.approx(SKEW, abs=0.05)


def test_the_first_step_of_epsilon_prediction_is_well_conditioned_from_its_start() -> None:
    """What an error of the network of 0.01, as low precision makes it, does to samples, and rounding in FP32."""
    assert STARTS == {"epsilon": 950, "v": 999}
    factors = {start: Diffusion(5, "ddim", start).table("epsilon")[1][0, COEFFICIENTS.index("x0_output")]
               for start in (950, 999)}  # fmt: skip
    assert -factors[950] == pytest.approx(np.sqrt(1 / ALPHAS[950] - 1), rel=1e-6) and -factors[950] < 13.1
    assert -factors[999] > 2e4
    assert np.abs(Diffusion(5, "ddim").table("v")[1][:, -2:]).max() <= 1

    def spoilt(prediction: str, start: int, **how: Any) -> float:
        diffusion = Diffusion(5, "dpmpp-2m", start)
        return rms(sample(MixtureHead(prediction, **how), diffusion), sample(MixtureHead(prediction), diffusion))

    assert spoilt("epsilon", 950, error=0.01) < 0.1
    assert spoilt("epsilon", 999, error=0.01) > 5
    assert spoilt("v", 999, error=0.01) < 0.05
    assert spoilt("epsilon", 950, dtype=np.float32) < 2e-6
    assert spoilt("epsilon", 999, dtype=np.float32) > 20 * spoilt("epsilon", 950, dtype=np.float32)


GAUSSIAN = {"weights": np.ones(1), "means": np.array([0.7]), "deviations": np.array([0.45])}


@pytest.mark.parametrize(("solver", "steps"), [("ddim", 100), ("dpmpp-2m", 50)])
def test_temperature_narrows_what_an_ode_solver_draws_as_it_does_for_the_official_sampler(
    solver: str, steps: int
) -> None:
    """Of a Gaussian to the temperature times its deviation, about the same mean; of the mixture as ddpm does."""
    narrow = sample(MixtureHead("v", **GAUSSIAN), Diffusion(steps, solver, temperature=0.8), 4000)
    noise = SeedNoise([5]).start(0, 4000, 1).std()
    assert narrow.std() == pytest.approx(0.8 * 0.45 * noise, rel=0.02)
    assert narrow.mean() == pytest.approx(0.7, abs=0.02)
    official = sample(MixtureHead("v"), Diffusion(100, "ddpm", temperature=0.8), 20_000)
    ours = sample(MixtureHead("v"), Diffusion(steps, solver, temperature=0.8), 20_000)
    assert ours.std() == pytest.approx(official.std(), rel=0.03) and official.std() < 0.85 * DEVIATION
    assert rms(np.sort(ours), np.sort(official)) < 0.06  # 0.25 between temperatures 1 and 0.8


@pytest.mark.parametrize("solver", SOLVERS)
def test_without_any_temperature_every_sample_is_the_same_for_ode_solvers_alone(solver: str) -> None:
    drawn = sample(MixtureHead("v"), Diffusion(8, solver, temperature=0.0))
    assert (np.ptp(drawn) < 1e-12) == (solver in ODE_SOLVERS)
    assert Diffusion(8, solver, temperature=0.7).start_scale == (0.7 if solver in ODE_SOLVERS else 1.0)


class Recorder:
    """The denoise stage of a pipeline, with the network's guided outputs and the noise written down."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.engine = pipeline.engine
        self.outputs: list[NDArray[np.float32]] = []
        self.noise: list[NDArray[np.float32]] = []

    def put(self, array: NDArray[Any]) -> Any:
        return self.engine.put(array)

    def run(self, stage: str, inputs: Mapping[str, Any], constants: Any = None) -> dict[str, Any]:
        alone = np.array([name == "x0_output" for name in COEFFICIENTS], np.float32)
        told = self.engine.run(stage, {**inputs, "coefficients": self.engine.put(alone)})
        self.outputs.append(self.engine.get(told["next_history"]).copy())
        self.noise.append(self.engine.get(inputs["noise"]).copy())
        return self.engine.run(stage, inputs)


CLOSE = {("epsilon", 950): 2e-6, ("v", 950): 2e-6, ("epsilon", 999): 3e-5, ("v", 999): 2e-6}
"""diffusers computes in FP32, which at 999 shows where x0 follows from epsilon."""


def draw_recorded(pipeline: Pipeline, diffusion: Diffusion, prediction: str) -> tuple[list[Any], Recorder]:
    """The states of two pictures [2, L, C] before and after every step of the tiny bundle's own graph, guided."""
    model, recorder = pipeline.bundle.manifest.model, Recorder(pipeline)
    shape = (model.tokens, model.channels)
    condition = np.random.default_rng(1).standard_normal((4, shape[0], 32)).astype(np.float32)
    noise = SeedNoise([3, 4])
    states: list[Any] = [noise.start(0, *shape)]
    step = Step(0, "level", 0, diffusion.steps, 2.5, {}, (), diffusion=diffusion)

    def keep(step: Step, done: int, state: Any) -> None:
        states.append(pipeline.engine.get(state).copy())

    diffuse(recorder, recorder.put(condition), step, noise, shape, prediction, keep)  # type: ignore[arg-type]
    return states, recorder


def follow(scheduler: Any, states: list[Any], recorder: Recorder, noisy: bool = False) -> list[float]:
    """The largest difference to a scheduler of diffusers that is given the recorded outputs, after every step, in units
    of the largest value."""
    import torch

    state, found = torch.from_numpy(states[0]), []
    for i, timestep in enumerate(scheduler.timesteps):
        extra = {"variance_noise": torch.from_numpy(recorder.noise[i])} if noisy else {}
        state = scheduler.step(torch.from_numpy(recorder.outputs[i]), timestep, state, **extra).prev_sample
        found.append(float(np.abs(state.numpy() - states[i + 1]).max() / np.abs(states[i + 1]).max()))
    return found


def scheduler_of(name: str, prediction: str, **settings: Any) -> Any:
    """A scheduler of diffusers with our betas."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed; pip install 'far-deploy[dev]'")
    betas = 1 - ALPHAS / np.append(1.0, ALPHAS[:-1])
    kind = {"epsilon": "epsilon", "v": "v_prediction"}[prediction]
    return getattr(diffusers, name)(trained_betas=betas, prediction_type=kind, timestep_spacing="trailing", **settings)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("steps", [1, 5, 20])
def test_ddim_is_that_of_diffusers(pipeline: Pipeline, steps: int, prediction: str) -> None:
    scheduler = scheduler_of("DDIMScheduler", prediction, clip_sample=False)
    scheduler.set_timesteps(steps)
    diffusion = Diffusion(steps, "ddim", TRAIN_STEPS - 1)
    assert diffusion.table(prediction)[0].tolist() == scheduler.timesteps.tolist()
    states, recorder = draw_recorded(pipeline, diffusion, prediction)
    assert max(follow(scheduler, states, recorder)) < CLOSE[prediction, TRAIN_STEPS - 1]


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("start", [950, 999])
@pytest.mark.parametrize("steps", [1, 3, 16])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp-2m", "dpmpp-2m-sde"])
def test_dpm_solvers_are_those_of_diffusers(
    pipeline: Pipeline, solver: str, steps: int, start: int, prediction: str
) -> None:
    """ddim as DPM-Solver++ of order 1."""
    scheduler = scheduler_of(
        "DPMSolverMultistepScheduler", prediction,
        algorithm_type="sde-dpmsolver++" if solver.endswith("sde") else "dpmsolver++",
        solver_order=1 if solver == "ddim" else 2, final_sigmas_type="zero",
    )  # fmt: skip
    diffusion = Diffusion(steps, solver, start)
    if start == TRAIN_STEPS - 1:
        scheduler.set_timesteps(steps)
        assert diffusion.table(prediction)[0].tolist() == scheduler.timesteps.tolist()
    else:  # it has no spacing that begins elsewhere
        scheduler.set_timesteps(timesteps=diffusion.table(prediction)[0].astype(int).tolist())
    states, recorder = draw_recorded(pipeline, diffusion, prediction)
    assert max(follow(scheduler, states, recorder, noisy=solver.endswith("sde"))) < CLOSE[prediction, start]


solvers, predictions = st.sampled_from(SOLVERS), st.sampled_from(["epsilon", "v"])


@given(solvers, predictions, st.integers(0, TRAIN_STEPS - 1), st.data(), st.sampled_from([0.0, 0.5, 2.0]))
def test_tables_are_finite_and_end_at_the_clean_sample(
    solver: str, prediction: str, start: int, data: st.DataObject, temperature: float
) -> None:
    steps = data.draw(st.integers(1, start + 1))
    timesteps, table = Diffusion(steps, solver, start, temperature).table(prediction)
    assert timesteps.dtype == table.dtype == np.float32
    assert timesteps.shape == (steps,) and table.shape == (steps, len(COEFFICIENTS))
    assert timesteps[0] == start and timesteps[-1] >= 0 and (np.diff(timesteps) < 0).all()
    assert np.isfinite(table).all()
    rows = [dict(zip(COEFFICIENTS, row, strict=True)) for row in table.tolist()]
    assert rows[0]["history"] == 0 and rows[-1]["history"] == 0 and rows[-1]["noise"] == 0
    if solver != "ddpm":
        last = rows[-1]
        assert (last["state"], last["output"]) == (last["x0_state"], last["x0_output"])
    noisy = solver in ("ddpm", "dpmpp-2m-sde") and temperature > 0
    assert all((row["noise"] > 0) == noisy for row in rows[:-1])


@given(st.integers(1, TRAIN_STEPS - 1), st.data())
def test_trailing_timesteps_fall_in_equal_strides(start: int, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, start + 1))
    found = trailing_timesteps(steps, start)
    strides = -np.diff(np.append(found, -1))
    assert found[0] == start and (strides >= 1).all()
    assert np.abs(strides - (start + 1) / steps).max() <= 1  # each end is rounded by half at the most


@given(solvers, predictions, st.integers(1, TRAIN_STEPS))
def test_any_number_of_steps_has_a_start(solver: str, prediction: str, steps: int) -> None:
    diffusion = Diffusion(steps, solver)
    usual = TRAIN_STEPS - 1 if solver == "ddpm" else STARTS[prediction]
    assert diffusion.table(prediction)[0][0] == max(usual, steps - 1)


@pytest.mark.parametrize(
    ("diffusion", "prediction", "reason"),
    [
        (Diffusion(5, "euler"), "v", "solver 'euler'; known: ddpm, ddim, dpmpp-2m, dpmpp-2m-sde"),
        (Diffusion(5, "euler"), "x0", "solver 'euler'"),
        (Diffusion(5, "ddim"), "x0", "prediction 'x0'; known: epsilon, v"),
        (Diffusion(5, "ddpm"), "x0", "prediction 'x0'"),
        (Diffusion(0, "ddim"), "v", "0 diffusion steps from 999"),
        (Diffusion(11, "ddim", 9), "v", "11 diffusion steps from 9; expected 1 to 10"),
        (Diffusion(11, "ddpm", 9), "v", "11 diffusion steps from 9"),
        (Diffusion(1, "dpmpp-2m", 1000), "v", "from 1000"),
        (Diffusion(1001, "dpmpp-2m"), "epsilon", "1001 diffusion steps"),
    ],
)
def test_what_no_table_can_be_made_of(diffusion: Diffusion, prediction: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        diffusion.table(prediction)


class Listening:
    """An engine that writes down what the denoise stage is told."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.told = engine, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def run(self, stage: str, inputs: Mapping[str, Any], constants: Any = None) -> dict[str, Any]:
        outputs: dict[str, Any] = self.engine.run(stage, inputs, constants)
        if stage == "denoise":
            read = {name: self.engine.get(array) for name, array in {**inputs, **outputs}.items()}
            self.told.append({name: array.copy() for name, array in read.items()})
        return outputs


def test_every_level_is_drawn_by_its_own_solver(any_pipeline: Pipeline) -> None:
    """Timesteps, coefficients and history of every call, with one name and one number for each level."""
    manifest = any_pipeline.bundle.manifest
    count = len(resolve_plan(manifest)[1])
    solver, steps = [SOLVERS[-1 - i] for i in range(count)], [2 + i % 2 for i in range(count)]
    engine = Listening(any_pipeline.engine)
    made = Pipeline(any_pipeline.bundle, engine).generate([1], [7], solver=solver, steps=steps, start=900)
    assert made.images.shape[0] == 1
    calls = iter(engine.told)
    for step in resolve_plan(manifest, {"solver": solver, "steps": steps, "start": 900})[1]:
        assert step.diffusion is not None
        assert (step.diffusion.solver, step.diffusion.steps) == (solver[step.index], steps[step.index])
        before = None
        for timestep, coefficients in zip(*step.diffusion.table(manifest.model.prediction), strict=True):
            call = next(calls)
            assert call["timestep"].tolist() == [timestep]
            assert call["coefficients"].tolist() == coefficients.tolist()
            assert before is None or np.array_equal(call["history"], before)
            before = call["next_history"]
        if solver[step.index] != "ddpm":
            assert np.allclose(call["next_state"], call["next_history"], atol=1e-6)  # it ends at the clean sample
    assert next(calls, None) is None


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--solver", "euler"], "--solver euler: unknown; known: ddpm, ddim, dpmpp-2m, dpmpp-2m-sde"),
        (["--solver", ""], "--solver : unknown"),
        (["--solver", "ddim,ddpm"], "--solver names 2 levels, the schedule has 4; give one name, or 4 names"),
        (["--solver", "ddim, ddpm, ddim, euler"], "--solver euler: unknown"),
        (["--start", "0"], "--start 0: expected a whole number from 1 to 999"),
        (["--start", "1000"], "--start 1000: expected a whole number from 1 to 999"),
        (["--start", "late"], "'late' is not a valid integer"),
        (["--start", "20", "--steps", "2,3,21,22"], "--start 20: leaves 21 timesteps for 22 steps; use fewer --steps"),
        (["--steps", "1001", "--solver", "ddim"], "1001 diffusion steps; expected 1 to 1000"),
        (
            ["--guidance-floor", "nan"],
            "--guidance-floor nan: expected a number of 0 or more; use --guidance-floor 1, say",
        ),
        (
            ["--temperature", "-1", "--solver", "ddim"],
            "--temperature -1.0: expected a number of 0 or more; use --temperature 1, say",
        ),
        (
            ["--shared-noise", "-1"],
            "--shared-noise -1: expected a whole number from 0 to 4, the levels of the grid; use --shared-noise 0, say",
        ),
        (["--shared-noise", "5"], "--shared-noise 5: expected a whole number from 0 to 4"),
        (["--shared-noise", "all"], "'all' is not a valid integer"),
        (
            ["--shared-noise", "1", "--levels", "0,2"],
            "--levels 0,2: with --shared-noise 1 level 0 draws what level 1 sees",
        ),
    ],
)
def test_bad_settings_get_one_line_and_exit_code_2(far: Any, tiny: Any, arguments: list[str], reason: str) -> None:
    result = far("generate", tiny.bundle, *arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ") and result.err.count("\n") == 1 and reason in result.err


@pytest.mark.parametrize("start", ["late", [5], 2**70, float("nan")])
def test_settings_of_another_kind_are_refused_in_python_too(pipeline: Pipeline, start: Any) -> None:
    with pytest.raises(FarError, match=r"start|sampling settings"):
        pipeline.generate([1], [0], solver="ddim", start=start)
    with pytest.raises(FarError):
        pipeline.generate([1], [0], solver=[start])


def test_ranges_of_steps_with_few_step_solvers(pipeline: Pipeline, mar_pipeline: Pipeline) -> None:
    """The paper's rising steps and DiSA's falling ones, by level and by iteration, given or from a preset."""
    far, mar = pipeline.bundle.manifest, mar_pipeline.bundle.manifest

    def steps(manifest: Any, **given: Any) -> list[tuple[str, int]]:
        plan = resolve_plan(manifest, given)[1]
        return [(step.diffusion.solver, step.diffusion.steps) for step in plan if step.diffusion is not None]

    assert steps(far, steps="2:8", solver="dpmpp-2m") == [("dpmpp-2m", number) for number in (2, 4, 6, 8)]
    assert steps(far, steps="40:100", solver="ddim,ddim,ddpm,ddpm") == [
        ("ddim", 40), ("ddim", 60), ("ddpm", 80), ("ddpm", 100)
    ]  # fmt: skip
    assert steps(mar, steps="50:5", solver="dpmpp-2m-sde") == [("dpmpp-2m-sde", number) for number in (50, 35, 20, 5)]
    assert steps(mar, preset="quality", iterations=2) == [("dpmpp-2m", 25), ("dpmpp-2m", 8)]
    assert steps(mar, preset="fast") == [("dpmpp-2m", number) for number in (8, 6, 5, 3)]
    assert steps(mar, preset="official", iterations=3) == [("ddpm", 100)] * 3
    assert steps(far, preset="balanced", levels="0,3", steps="1:2") == [("dpmpp-2m", 1), ("dpmpp-2m", 2)]
    rising = pipeline.generate([1], [0], steps="1:6", solver="dpmpp-2m").images
    falling = mar_pipeline.generate([1], [0], preset="fast").images
    assert rising.std() > 0 and falling.std() > 0
