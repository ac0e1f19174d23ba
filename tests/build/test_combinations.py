"""What of a config goes together, and what is refused at start, with the reason."""

import jax.numpy as jnp
import numpy as np
import pytest

from ddpm.build.experiment import build
from ddpm.build.objective import objective as objective_of
from ddpm.build.sampler import check_sampling
from ddpm.build.schedule import noise_schedule
from ddpm.config import default, with_settings
from ddpm.data.sources import ArraySource
from ddpm.errors import InputError
from ddpm.interop import settings
from ddpm.interop.weights import export
from ddpm.modes.loading import Run
from ddpm.modes.measures.job import prepare

T = 20
LEARNED = {
    "diffusion__schedule": "learned",
    "model__noise_input": "log_snr",
    "training__loss": "continuous_bound",
}


def configured(**values):
    config = default()
    config.diffusion.update(num_steps=T, schedule="cosine")
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in values.items()})
    return config


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"diffusion__schedule": "jsd"}, r"prediction = 'eps': the schedule leaves no signal"),
        ({"diffusion__zero_terminal_snr": True}, r"prediction = 'eps': the schedule leaves no"),
        (
            {"diffusion__zero_terminal_snr": True, "diffusion__prediction": "score"},
            r"prediction = 'score': .*predict x_0 or v",
        ),
        (
            {"diffusion__zero_terminal_snr": True, "diffusion__prediction": "edm"},
            r"prediction = 'edm': the schedule leaves no signal",
        ),
        (
            {"diffusion__zero_terminal_snr": True, "diffusion__prediction": "v",
             "training__loss_weight": "likelihood"},
            r"loss_weight = 'likelihood': it is an integral over log-SNR, which has no end",
        ),
        (
            {"diffusion__zero_terminal_snr": True, "diffusion__prediction": "v",
             "training__loss": "continuous_bound"},
            r"training.loss = 'continuous_bound': it is an integral over log-SNR",
        ),
        ({"diffusion__variance": "learned"}, r"'learned': .*loss = 'mse' says nothing of the var"),
        (
            {"diffusion__variance": "learned_range", "training__loss": "continuous_bound"},
            r"'continuous_bound' says nothing of the variance: take 'hybrid' or 'bound'",
        ),
        (
            {"diffusion__variance": "learned", "diffusion__prediction": "edm",
             "training__loss": "hybrid"},
            r"EDM's preconditioning is of x_0 alone",
        ),
        ({"training__loss": "hybrid"}, r"'hybrid': .*config.diffusion.variance = 'fixed_large'"),
        (
            {"training__loss": "bound", "training__loss_weight": "min_snr"},
            r"loss_weight = 'min_snr': the bound has its own weights",
        ),
        (
            {"training__loss": "l1", "training__loss_weight": "p2"},
            r"weights are of squared errors, not of config.training.loss = 'l1'",
        ),
        (
            {"training__loss": "huber", "diffusion__prediction": "edm"},
            r"EDM's network is trained by the squared error",
        ),
        (
            {"training__loss": "bound", "training__times": "log_normal"},
            r"times = 'log_normal': the loss is an integral over evenly drawn times",
        ),
        (
            {"training__loss_weight": "sigmoid", "training__times": "logit_normal"},
            r"times = 'logit_normal': the loss is an integral over evenly drawn times",
        ),
        (
            {"training__loss": "continuous_bound", "training__times": "importance"},
            r"times = 'importance': it remembers the losses of whole times",
        ),
        (
            {"diffusion__prediction": "posterior_mean", "training__times": "log_normal"},
            r"'posterior_mean': it is of the step from t to t - 1, .*fractional .*'log_normal'",
        ),
        (
            {"diffusion__variance": "learned", "training__loss": "bound", "sampling__steps": 10},
            r"sampling.steps = 10: .*train with 'learned_range'",
        ),
        (
            {"diffusion__variance": "learned", "training__loss": "bound",
             "sampling__times": (20, 10, 0)},
            r"sampling.times = \(20, 10, 0\): .*train with 'learned_range'",
        ),
        (
            {"diffusion__variance": "learned", "training__loss": "bound",
             "sampling__grid": "log_snr"},
            r"sampling.grid = 'log_snr': .*train with 'learned_range'",
        ),
        (
            {"diffusion__variance": "learned_range", "training__loss": "hybrid",
             "sampling__variance": "analytic"},
            r"sampling.variance = 'analytic': the model has learned its own",
        ),
        (
            {"diffusion__variance": "fixed_small"},
            r"variance = 'fixed_small': .*'mse' has no reverse variance .*sampling.variance",
        ),
        (
            {"diffusion__zero_terminal_snr": True, "diffusion__prediction": "v",
             "training__times": "log_normal"},
            r"times = 'log_normal': sigma/alpha is infinite .* T is never drawn",
        ),
        (
            {"diffusion__num_steps": 1, "training__loss": "continuous_bound"},
            r"loss = 'continuous_bound': .*a schedule of one noise level",
        ),
        (
            {"diffusion__num_steps": 1, "training__loss_weight": "sigmoid"},
            r"loss_weight = 'sigmoid': .*a schedule of one noise level",
        ),
        (
            {"sampling__sampler": "dpm_solver", "sampling__stochastic": True, "sampling__order": 3,
             "sampling__times": (20, 10, 0)},
            r"sampler = 'dpm_solver': order = 3 with stochastic = True: .* take order 1 or 2",
        ),
        ({"diffusion__schedule": "learned"}, r"noise_input = 't': t means another noise as the"),
        (
            {"diffusion__schedule": "geometric", "diffusion__sigma_min": 3.0,
             "diffusion__sigma_max": 2.0},
            r"config.diffusion: sigma from 3.0 to 2.0: must rise from above 0",
        ),
        (
            {"model__noise_input": "none", "diffusion__zero_terminal_snr": True,
             "diffusion__prediction": "v"},
            r"noise_input = 'none': the network is given x_t/alpha_t, which is infinite",
        ),
        (
            {"model__noise_input": "none", "diffusion__prediction": "edm"},
            r"noise_input = 'none': EDM's preconditioning has its own input for the noise",
        ),
        (
            {"model__noise_input": "none", "model__add_input": True},
            r"config.model.add_input = True: would add x_t/alpha_t, .*leave it at False",
        ),
        (LEARNED | {"model__noise_input": "none"}, r"noise_input = 'none': .*take 'log_snr'"),
        (
            LEARNED | {"training__loss": "mse"},
            r"training.loss = 'mse': a schedule is learned by the continuous bound alone",
        ),
        (LEARNED | {"training__loss": "bound"}, r"training.loss = 'bound': a schedule is learned"),
        (
            LEARNED | {"training__loss": "hybrid", "diffusion__variance": "learned_range"},
            r"training.loss = 'hybrid': a schedule is learned by the continuous bound",
        ),
        (
            LEARNED | {"training__times": "importance"},
            r"times = 'importance': it remembers the losses of whole times",
        ),
        (LEARNED | {"training__times": "log_normal"}, r"integral over evenly drawn times"),
        (
            LEARNED | {"diffusion__reference_resolution": 64},
            r"schedule = 'learned': it is learned, and neither rescaled nor shifted",
        ),
        (LEARNED | {"diffusion__variance": "learned_range"}, r"says nothing of the variance"),
        (
            LEARNED | {"diffusion__prediction": "posterior_mean"},
            r"times are fractional with .*'continuous_bound'",
        ),
        (LEARNED | {"diffusion__prediction": "edm"}, r"has its own input for it: take 't'"),
        (
            LEARNED | {"diffusion__log_snr_0": -5.0},
            r"config.diffusion: log-SNR from -5.0 to -5.0: must fall",
        ),
        (
            LEARNED | {"diffusion__num_steps": 1},
            r"config.diffusion: num_steps = 1: must be a whole number >= 2",
        ),
        (
            {"model__energy": "norm", "diffusion__prediction": "v"},
            r"energy = 'norm': the gradient of an energy is eps, .*prediction = 'v': take 'eps'",
        ),
        ({"model__energy": "norm", "diffusion__prediction": "edm"}, r"prediction = 'edm': take"),
        (
            {"model__energy": "norm", "diffusion__variance": "learned_range",
             "training__loss": "hybrid"},
            r"energy = 'norm': an energy is one number, .*'learned_range': take 'fixed_large'",
        ),
        (
            {"model__energy": "denoising", "training__self_conditioning": True},
            r"self_conditioning = True: with its own estimate .*energy = 'denoising': leave it off",
        ),
        (
            {"model__energy": "denoising", "model__dtype": "bfloat16"},
            r"config.model.dtype = 'bfloat16': the gradient .*take 'float32'",
        ),
        (
            LEARNED | {"training__augmentation": 0.1},
            r"augmentation = 0.1: .*decoder of a learned schedule codes: take another",
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_with_the_reason(values, said):
    with pytest.raises(InputError, match=said) as error:
        build(configured(**values), (16, 16, 3))
    assert "\n" not in str(error.value)


def test_what_goes_together_is_not_refused():
    for values in (
        {"diffusion__zero_terminal_snr": True, "diffusion__prediction": "v"},
        {"diffusion__schedule": "jsd", "diffusion__prediction": "x_0", "training__loss": "bound"},
        {"diffusion__variance": "learned_range", "training__loss": "hybrid", "sampling__steps": 10},
        {"diffusion__variance": "learned", "training__loss": "bound", "sampling__steps": 10,
         "sampling__sampler": "ddim"},
        {"diffusion__variance": "learned", "training__loss": "bound",
         "sampling__times": tuple(range(20, -1, -1))},
        {"training__loss": "hybrid", "diffusion__variance": "learned_range",
         "training__loss_weight": "min_snr", "training__times": "importance"},
        LEARNED | {"diffusion__prediction": "v", "training__times": "low_discrepancy"},
        LEARNED | {"diffusion__prediction": "edm", "model__noise_input": "t"},
        LEARNED | {"model__energy": "inner_product"},
        {"model__energy": "denoising", "training__loss": "bound",
         "model__num_classes": 3},
    ):  # fmt: skip
        check_sampling(configured(**values), noise_schedule(configured(**values)))
        objective_of(configured(**values), noise_schedule(configured(**values)))


def test_a_network_without_a_noise_input_is_given_y_at_any_time():
    """Also between the whole ones, where solvers ask; so that x_0 = y - s f(y)."""
    values = {"model__noise_input": "none", "diffusion__schedule": "geometric"}
    built = build(configured(**values), (16, 16, 3))
    y = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    for t in (np.array([1, 2, 5, T]), np.float32([1.0, 1.5, 7.25, T - 0.5])):
        s = 0.02 * 5000 ** ((t - 1)[:, None] / (T - 1))  # from 0.02 to 100
        alpha = 1 / np.hypot(1, s)
        found = built.objective.denoiser(lambda y, t: jnp.sin(y))(alpha * y, t)
        np.testing.assert_allclose(found.x_0, y - s * np.sin(y), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"diffusion__prediction": "posterior_mean"}, "'posterior_mean': it is of whole times"),
        (
            {"diffusion__prediction": "v", "diffusion__zero_terminal_snr": True},
            "no end in log-SNR: leave 'flow' out",
        ),
    ],
)
def test_flow_that_cannot_be_is_refused_before_anything_is_computed(values, said, tmp_path):
    run = Run(build(configured(**values), (16, 16, 3)), {}, None, 1, "", "")
    data = ArraySource(np.zeros((2, 16, 16, 3), np.uint8), None, None)
    with pytest.raises(InputError, match=said):
        prepare(run, tmp_path, data, data, ["bound", "flow"])


def test_what_diffusers_cannot_say_is_not_exported(tmp_path):
    for values in (
        {"diffusion__prediction": "v"},
        {"diffusion__variance": "learned_range", "training__loss": "hybrid"},
    ):
        built = build(configured(**values), (16, 16, 3))
        with pytest.raises(InputError, match="only networks that predict eps"):
            export(tmp_path / "out", built, {})
    built = build(configured(model__energy="denoising"), (16, 16, 3))
    with pytest.raises(InputError, match=r"model.energy = 'denoising': such a network can be"):
        export(tmp_path / "out", built, {})
    assert not (tmp_path / "out").exists()


def test_weights_of_others_predict_eps_whatever_the_config_says():
    theirs = settings.noise_settings({"num_train_timesteps": T}, "file")
    config = configured(diffusion__prediction="v", diffusion__zero_terminal_snr=True)
    config, _ = with_settings(config, diffusion=theirs.diffusion)
    assert (config.diffusion.prediction, config.diffusion.variance) == ("eps", "fixed_large")
    assert not noise_schedule(config).ends_without_signal()
