"""Solvers: their orders on the exact flow, the identities between them, and `diffusers`' own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

from ddpm import NoiseSchedule, Prediction, ancestral, ddim, fixed_small, sample, schedules
from ddpm.diffusion.predictions import from_eps
from ddpm.diffusion.process import GaussianDiffusion
from ddpm.sampling import grids
from ddpm.sampling.adaptive import probability_flow
from ddpm.sampling.langevin import annealed_langevin, predictor_corrector
from ddpm.sampling.sample import run_chain
from ddpm.sampling.samplers import StepInfo
from ddpm.sampling.solvers import _moment, _weights, dpm_solver, euler, heun, unipc
from tests.exact import close, gaussian_denoiser, mixture_denoiser, pair

# --- The order of convergence, in float64: in float32 the third is lost in rounding

FINE = 384
LOG_SNR = np.linspace(5.0, -9.0, FINE + 1)


def fine_schedule():
    """Log-SNR evenly spread, in float64: every FINE // n-th time is a grid of n steps."""
    log_snr = jnp.asarray(np.concatenate([[np.inf], LOG_SNR]))
    return NoiseSchedule(log_snr, jnp.zeros_like(log_snr))


def exact_denoiser(mean, variance):
    """Of x_0 ~ N(mean, variance), in float64."""

    def denoise(x_t, t):
        snr = jnp.exp(fine_schedule().at(t).high)[:, None]
        alpha, sigma = jnp.sqrt(snr / (1 + snr)), jnp.sqrt(1 / (1 + snr))
        centred = (x_t - alpha * mean) / (alpha**2 * variance + sigma**2)
        return Prediction(mean + alpha * variance * centred, sigma * centred)

    return denoise


def flow_map(x, mean, variance):
    """From the first noise to the last: (x - alpha m) / std of x_t is carried along."""
    snr = np.exp(LOG_SNR[[-1, 0]])
    alpha, sigma = np.sqrt(snr / (1 + snr)), np.sqrt(1 / (1 + snr))
    spread = np.sqrt(alpha**2 * variance + sigma**2)
    return alpha[1] * mean + spread[1] / spread[0] * (x - alpha[0] * mean)


@functools.partial(jax.jit, static_argnames=("sampler", "n"))
def fine_chain(x, mean, variance, sampler, n):
    """A chain of n steps over the whole fine schedule, of any Gaussian data."""
    return sample(
        jax.random.key(0),
        fine_schedule(),
        exact_denoiser(mean, variance),
        x.shape,
        sampler=sampler,
        times=1 + np.arange(n, -1, -1) * (FINE // n),
        x_t=x,
    )


@pytest.mark.parametrize(
    ("sampler", "order"),
    [
        (ddim(), 1),
        (euler(), 1),
        (dpm_solver(1), 1),
        (dpm_solver(2), 2),
        (dpm_solver(3), 3),
        (unipc(1), 2),
        (unipc(2), 3),
        (heun(), 2),
    ],
    ids=["ddim", "euler", "dpm1", "dpm2", "dpm3", "unipc1", "unipc2", "heun"],
)
@pytest.mark.parametrize(("mean", "variance"), [(0.4, 0.25), (0.2, 0.05)])
def test_order_of_convergence(sampler, order, mean, variance):
    with jax.enable_x64(True):
        x = np.linspace(-2, 2, 9)[:, None]
        wanted, errors = flow_map(x, mean, variance), []
        for n in (FINE // 2, FINE):
            found = fine_chain(jnp.asarray(x), mean, variance, sampler, n)
            errors.append(np.abs(np.asarray(found) - wanted).max())
    assert found.dtype == np.float64
    assert abs(np.log2(errors[0] / errors[1]) - order) < 0.25
    assert errors[1] < 0.02


@pytest.mark.parametrize(
    "solver", [dpm_solver, unipc, functools.partial(dpm_solver, stochastic=True)]
)
def test_other_orders_are_refused(solver):
    orders = (0, 4, 2.5, 3) if isinstance(solver, functools.partial) else (0, 4, 2.5)
    for order in orders:
        with pytest.raises(ValueError, match=f"order = {order}"):
            solver(order)


class OneNoiseEach(GaussianDiffusion):
    """Draws 1 into the i-th time of a chain for the i-th example, and 0 otherwise."""

    def noise(self, keys, stream, shape):
        into = jnp.concatenate([self.variance, jnp.array([-1, -1])])
        return jnp.broadcast_to(into[:, None] == stream, (len(into), *shape)) * 1.0


@functools.partial(jax.jit, static_argnames=("order", "n"))
def responses(mean, variance, order, n):
    """How the end of a chain of the SDE's solver responds to each noise, none, and x_T = 1."""
    sampler, times = dpm_solver(order, stochastic=True), 1 + np.arange(n, -1, -1) * (FINE // n)
    process = OneNoiseEach(fine_schedule(), times[1:], sampler.step, sampler.memory)
    start = jnp.zeros((n + 2, 1)).at[-1].set(1.0)
    denoise = exact_denoiser(mean, variance)
    key = jax.random.key(0)
    return run_chain(key, process, denoise, start.shape, np.int32(times), x_t=start).x_0[:, 0]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("mean", "variance"), [(0.4, 0.25), (0.2, 0.05)])
def test_weak_order_of_convergence(order, mean, variance):
    """On a Gaussian a chain is affine in its noises, so its moments are exact: no sample is drawn.

    With the formula of order 3 the rate would be 2.1 here, and the errors those of order 2.
    """
    snr = np.exp(LOG_SNR[[-1, 0]])
    alpha, at_end = np.sqrt(snr / (1 + snr)), (snr * variance + 1) / (1 + snr)
    errors = []
    with jax.enable_x64(True):
        for n in (FINE // 4, FINE // 2):
            found = np.asarray(responses(mean, variance, order, n))
            gain = found - found[-2]
            assert found.dtype == np.float64
            close(found[-2] + gain[-1] * alpha[0] * mean, alpha[1] * mean, rtol=1e-10)
            spread = (gain[:-2] ** 2).sum() + gain[-1] ** 2 * at_end[0]
            errors.append(abs(spread / at_end[1] - 1))
    assert abs(np.log2(errors[0] / errors[1]) - order) < 0.35
    assert errors[1] < 0.04


def test_the_adaptive_solver_reaches_its_tolerance():
    schedule, exact = pair("linear", 1000)
    denoise = gaussian_denoiser(exact, 0.4, 0.25)
    x = np.float32(np.linspace(-2, 2, 9)[:, None])
    spread = np.sqrt(exact.alpha_bar * 0.25 + exact.variance)
    wanted = exact.alpha[1] * 0.4 + spread[1] / spread[-1] * (x - exact.alpha[-1] * 0.4)
    for tolerance in (1e-3, 1e-5):
        draw = functools.partial(sample, sampler=probability_flow(tolerance), times=[1000, 1])
        x_1 = jax.jit(lambda key, draw=draw: draw(key, schedule, denoise, x.shape, x_t=x))(
            jax.random.key(0)
        )
        close(x_1, wanted, atol=20 * tolerance)


@pytest.mark.parametrize("h", [1e-3, 0.3, 0.99, 1.01, 5.0, 80.0])
def test_moments(h):
    total = quad(lambda r: h * np.exp(-h * (1 - r)), 0, 1)[0]
    for k in (1, 2, 3):
        by_quadrature = quad(lambda r: h * np.exp(-h * (1 - r)) * r**k, 0, 1)[0]  # noqa: B023
        close(_moment(k, jnp.float32(h)), by_quadrature / total, rtol=2e-5)


def test_weights_integrate_parabolas():
    h, places = 0.7, (-0.8, 1.0)
    weights = _weights(jnp.float32(h), [jnp.float32(r) for r in places])
    curve = lambda r: 0.3 - 1.2 * r + 0.5 * r**2  # noqa: E731
    mean = quad(lambda r: h * np.exp(-h * (1 - r)) * curve(r), 0, 1)[0] / -np.expm1(-h)
    found = curve(0) + sum(w * (curve(r) - curve(0)) for w, r in zip(weights, places, strict=True))
    close(found, mean, rtol=1e-5)


# --- Identities


@functools.cache
def ends(sampler, grid=grids.log_snr, steps=12, name="linear"):
    """A chain on a mixture with times to 0."""
    schedule, exact = pair(name, 1000)
    denoise = mixture_denoiser(exact, [0.3, 0.7], [[-0.6], [0.5]], 0.09)
    t = grid(schedule, steps)
    key = jax.random.key(1)
    run = jax.jit(lambda: sample(key, schedule, denoise, (16, 1), sampler=sampler, times=t))
    return np.asarray(run())


@pytest.mark.parametrize("grid", [grids.log_snr, grids.karras, grids.uniform])
def test_first_order_is_ddim(grid):
    expected = ends(ddim(), grid)
    for other in (dpm_solver(1), euler()):
        close(ends(other, grid), expected, atol=2e-4)
    for other in (dpm_solver(2), heun()):
        assert abs(ends(other, grid) - expected).max() > 1e-3


def test_the_stochastic_solver_of_first_order_is_ancestral_sampling():
    close(ends(dpm_solver(1, stochastic=True)), ends(ancestral(fixed_small)), atol=2e-5)


@pytest.mark.parametrize("sampler", [dpm_solver(2), dpm_solver(3), unipc(2), unipc(3), heun()])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_chain_of_few_steps_ends_in_the_last_prediction(sampler, steps):
    """Of one step it is the predicted x_0: no history, nothing corrected."""
    found = ends(sampler, steps=steps)
    assert np.isfinite(found).all()
    if steps == 1:
        close(found, ends(ddim(), steps=1), atol=1e-6)


@pytest.mark.parametrize("sampler", [dpm_solver(1), dpm_solver(2), unipc(2), euler(), heun()])
def test_step_of_no_size_is_the_identity(sampler):
    schedule, exact = pair("linear", 1000)
    denoise = gaussian_denoiser(exact, 0.4, 0.25)
    x = jnp.linspace(-2, 2, 7)[:, None]
    t = jnp.asarray(300)
    step_info = StepInfo(t, t, jnp.asarray(0), jnp.asarray([300, 300]))
    found = jax.jit(
        lambda: sampler.step(schedule, denoise, x, step_info, lambda k=0: x, sampler.memory(x)).x
    )()
    close(found, x, atol=2e-6)


@pytest.mark.parametrize("sampler", [dpm_solver(3), unipc(3), dpm_solver(stochastic=True)])
def test_a_schedule_without_signal_at_the_end(sampler):
    """log_snr[T] = -inf: h is infinite in the first step, and nothing of it may become NaN."""
    schedule, exact = pair("jsd", 1000)
    denoise, t = gaussian_denoiser(exact, 0.4, 0.25), grids.uniform(schedule, 40)
    key = jax.random.key(0)
    run = jax.jit(lambda: sample(key, schedule, denoise, (2000, 1), sampler=sampler, times=t))
    found = np.asarray(run())
    assert np.isfinite(found).all()
    assert abs(found.mean() - 0.4) < 0.05
    assert abs(found.var() - 0.25) < 0.05


@pytest.mark.parametrize(
    "sampler",
    [euler(), heun(), heun(churn=5.0), probability_flow(), annealed_langevin(),
     predictor_corrector(heun())],
)  # fmt: skip
def test_samplers_that_need_a_signal_refuse_a_schedule_without(sampler):
    """The function refuses as the command does, in place of samples that are NaN."""
    schedule = schedules.zero_terminal_snr(schedules.linear(20))
    denoise = lambda x_t, t: Prediction(0 * x_t, x_t)  # noqa: E731
    with pytest.raises(ValueError, match=r"leaves no signal at t = T = 20 \(alpha_T = 0\)"):
        sample(jax.random.key(0), schedule, denoise, (2, 3), sampler=sampler)


@pytest.mark.parametrize("sampler", ["ddim", ddim])
def test_what_is_no_sampler_is_refused(sampler):
    with pytest.raises(TypeError, match=r"^sampler is .*: pass one as it is made, ddpm\.ddim"):
        sample(jax.random.key(0), schedules.linear(5), lambda x, t: x, (2, 3), sampler=sampler)


@pytest.mark.parametrize("make", [dpm_solver, unipc])
@pytest.mark.parametrize("order", [0, 4])
def test_orders_that_there_are_not(make, order):
    with pytest.raises(ValueError, match=r"must be one of 1\.\.3"):
        make(order)


@pytest.mark.parametrize("churn", [-1.0, float("nan")])
def test_negative_churn_is_refused(churn):
    with pytest.raises(ValueError, match="churn"):
        heun(churn=churn)


# --- diffusers


def network(x, t):
    """A smooth eps(x, t) of NumPy arrays: t as in the paper."""
    return np.sin(2.0 * x + 0.004 * t) * 0.8 + 0.3 * x


def ours(sampler, times, x_t):
    schedule = schedules.linear(1000)

    def denoise(x, t):
        t_ = t[:, None].astype(jnp.float32)
        return from_eps(schedule, x, t, jnp.sin(2.0 * x + 0.004 * t_) * 0.8 + 0.3 * x)

    run = jax.jit(
        lambda x: sample(
            jax.random.key(0), schedule, denoise, x.shape, sampler=sampler, times=times, x_t=x
        )
    )
    return np.asarray(run(jnp.asarray(x_t)))


def theirs(scheduler, steps, x_t, *, of_sigma=False):
    """Their samples, and the times in our index."""
    import torch

    scheduler.set_timesteps(steps)
    x = torch.tensor(x_t, dtype=torch.float64)
    if of_sigma:
        x = x * (float(scheduler.sigmas[0]) ** 2 + 1) ** 0.5
    visited = []
    for t in scheduler.timesteps:
        asked = np.asarray(scheduler.scale_model_input(x, t))
        eps = torch.tensor(network(asked, float(t) + 1))
        x = scheduler.step(eps, t, x).prev_sample
        if not visited or visited[-1] != int(t) + 1:
            visited.append(int(t) + 1)
    return np.asarray(x), [*visited, 0]


NOISE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
PAIRS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}, ddim()),
    "dpm_solver_2m": (
        "DPMSolverMultistepScheduler",
        {"solver_order": 2, "algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"},
        dpm_solver(2),
    ),
    "unipc_2": (
        "UniPCMultistepScheduler",
        {"solver_order": 2, "solver_type": "bh2", "final_sigmas_type": "zero"},
        unipc(2),
    ),
    "unipc_3": (
        "UniPCMultistepScheduler",
        {"solver_order": 3, "solver_type": "bh2", "final_sigmas_type": "zero"},
        unipc(3),
    ),
    "heun": ("HeunDiscreteScheduler", {}, heun()),
}


# Their DDIM goes T // N further down than its own list where that is not even, and their Heun takes
# sigma, not log sigma, for linear between two times: 'linspace' is for the other two.
CASES = [(name, spacing) for name in PAIRS for spacing in ("leading", "trailing")]
CASES += [("dpm_solver_2m", "linspace"), ("unipc_2", "linspace")]


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
@pytest.mark.parametrize(("name", "spacing"), CASES)
def test_samples_are_those_of_diffusers(name, spacing):
    diffusers = pytest.importorskip("diffusers")
    kind, options, sampler = PAIRS[name]
    x_t = np.random.default_rng(4).normal(size=(5, 3)).astype(np.float32)
    scheduler = getattr(diffusers, kind)(**NOISE, **options, timestep_spacing=spacing)
    expected, times = theirs(scheduler, 20, x_t, of_sigma=name == "heun")
    close(ours(sampler, times, x_t), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("steps", [10, 50, 300])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_grids_are_those_of_diffusers(spacing, steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=1000, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    found = getattr(grids, spacing)(schedules.linear(1000), steps)
    assert found.tolist() == [*(int(t) + 1 for t in scheduler.timesteps), 0]
