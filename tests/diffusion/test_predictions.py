"""Conversions there and back at every time, against x_t made from a known x_0 and eps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm import (
    Prediction,
    clipped,
    denoiser,
    loss_weights,
    losses,
    predictions,
    q_sample,
    schedules,
    score,
)
from ddpm.diffusion import continuous
from tests.exact import NAMES, close, gaussian_denoiser, pair

# Compiled or not; short chains only compiled, for the tests' own speed.
LENGTHS = [(1, True), (7, True), (1000, True), (1000, False)]
READINGS = {
    "from_eps": predictions.from_eps,
    "from_x_0": predictions.from_x_0,
    "from_v": predictions.from_v,
    "from_score": predictions.from_score,
    "from_posterior_mean": predictions.from_posterior_mean,
}


def known(schedule, exact, num_steps):
    """Every t with its x_0, eps and x_t: the last both as float32 and, of the same, in float64."""
    t = np.arange(1, num_steps + 1)
    x_0, eps = np.float32(np.random.default_rng(5).normal(size=(2, num_steps, 3)).clip(-2, 2))
    x_t = exact.alpha[t][:, None] * x_0 + exact.sigma[t][:, None] * eps
    return t, x_0, eps, x_t


def targets(exact, t, x_0, eps, x_t):
    """What a perfect network would put out, in float64, by the definition of each."""
    alpha, sigma = exact.alpha[t][:, None], exact.sigma[t][:, None]
    of_x_0, of_x_t, _ = exact.posterior(t - 1, t)
    return {
        "from_eps": eps,
        "from_x_0": x_0,
        "from_v": alpha * eps - sigma * x_0,
        "from_score": -(x_t - alpha * x_0) / exact.variance[t][:, None],
        "from_posterior_mean": of_x_0[:, None] * x_0 + of_x_t[:, None] * x_t,
    }


@pytest.mark.parametrize(("num_steps", "jitted"), LENGTHS)
@pytest.mark.parametrize("name", NAMES)
def test_every_reading_finds_x_0_and_eps(name, num_steps, jitted):
    schedule, exact = pair(name, num_steps)
    t, x_0, eps, x_t = known(schedule, exact, num_steps)
    alpha, sigma = exact.alpha[t][:, None], exact.sigma[t][:, None]
    # Rounding alone is amplified by what divides: these are the condition numbers.
    with np.errstate(divide="ignore"):
        slack = {
            "from_eps": (1 + 1 / alpha, 1),
            "from_x_0": (1, 1 + 1 / sigma),
            "from_v": (1, 1),
            "from_score": (1 + 1 / alpha, 1),
            "from_posterior_mean": (
                1 + 1 / exact.posterior(t - 1, t)[0][:, None],
                1 / sigma + alpha / sigma / exact.posterior(t - 1, t)[0][:, None],
            ),
        }
    for key, target in targets(exact, t, x_0, eps, x_t).items():
        # Where alpha_t = 0 (jsd's last step) noise says nothing of x_0, by definition.
        defined = np.ones(num_steps, bool)
        if key in ("from_eps", "from_score"):
            defined = exact.alpha[t] > 0
        read = jax.jit(READINGS[key]) if jitted else READINGS[key]
        found = read(schedule, np.float32(x_t), t, np.float32(target))
        for value, true, amplified in zip(found[:2], (x_0, eps), slack[key], strict=True):
            error = (abs(value - true) / amplified)[defined]
            assert (error < 2e-6).all(), (key, error.max())
        assert found.log_variance is None


@pytest.mark.parametrize("name", NAMES)
def test_writing_v_and_score(name):
    schedule, exact = pair(name, 1000)
    t, x_0, eps, x_t = known(schedule, exact, 1000)
    target, truth = targets(exact, t, x_0, eps, x_t), Prediction(x_0, eps)
    close(predictions.to_v(schedule, t, truth), target["from_v"], rtol=1e-5, atol=1e-6)
    close(predictions.to_score(schedule, t, truth), target["from_score"], rtol=1e-5, atol=1e-6)
    mean = predictions.to_posterior_mean(schedule, np.float32(x_t), t, truth)
    close(mean, target["from_posterior_mean"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_v_and_score_there_and_back_without_the_truth(name):
    """For any output, not only a possible one: x_0 and eps stay bound by Eq. 4."""
    from_v, from_score, to_v, to_score, noised = (
        jax.jit(f)
        for f in (
            predictions.from_v,
            predictions.from_score,
            predictions.to_v,
            predictions.to_score,
            q_sample,
        )
    )
    schedule, exact = pair(name, 1000)
    t = np.arange(1, 951)
    x_t, output = np.float32(np.random.default_rng(6).normal(size=(2, len(t), 3)))
    v = from_v(schedule, x_t, t, output)
    close(to_v(schedule, t, v), output, atol=3e-6)
    close(noised(schedule, v.x_0, t, v.eps), x_t, atol=3e-6)
    score = from_score(schedule, x_t, t, output)
    close(to_score(schedule, t, score), output, rtol=1e-6, atol=1e-7)
    alpha = exact.alpha[t][:, None]
    error = noised(schedule, score.x_0, t, score.eps) - x_t
    assert (abs(error) * alpha < 3e-6).all()


@pytest.mark.parametrize("name", NAMES)
def test_equation_11(name):
    """(x_t - beta_t/sqrt(1 - abar_t) eps)/sqrt(1 - beta_t) is the posterior mean at x_0(eps)."""
    schedule, exact = pair(name, 1000)
    last = 999 if name == "jsd" else 1000
    t = np.arange(1, last + 1)
    x_t, eps = np.float32(np.random.default_rng(7).normal(size=(2, last, 3)))
    beta, sigma = exact.beta[t][:, None], exact.sigma[t][:, None]
    expected = (x_t - beta / sigma * eps) / np.sqrt(1 - beta)
    prediction = predictions.from_eps(schedule, x_t, t, eps)
    found = predictions.to_posterior_mean(schedule, x_t, t, prediction)
    tolerance = 1e-5 if name == "steep" else 3e-6  # its log-SNR of -139 is rounded to 8e-6
    assert (abs(found - expected) < tolerance / np.sqrt(1 - beta)).all()


@jax.jit
def both(schedule, x_t, t, eps):
    """The prediction of eps, with some log-variance, and the same clipped."""
    plain = predictions.from_eps(schedule, x_t, t, eps)._replace(log_variance=eps)
    return plain, clipped(schedule, lambda x_t, t: plain)(x_t, t)


@pytest.mark.parametrize("name", NAMES)
def test_clipping_keeps_x_0_in_range_and_derives_eps_anew(name):
    schedule, _ = pair(name, 1000)
    t = np.arange(1, 1000)
    x_t, eps = np.float32(np.random.default_rng(8).normal(size=(2, len(t), 3)))
    plain, found = jax.tree.map(np.asarray, both(schedule, x_t, t, eps))
    assert (abs(found.x_0) <= 1).all()
    inside = abs(plain.x_0) <= 1
    assert 0 < inside.sum() < inside.size
    assert (found.x_0 == plain.x_0)[inside].all()
    assert (abs(found.x_0) == 1)[~inside].all()
    close(jax.jit(q_sample)(schedule, found.x_0, t, found.eps), x_t, atol=1e-6)
    assert (found.log_variance == eps).all()


def test_clipping_to_another_range():
    schedule = schedules.linear(10)
    f = clipped(schedule, lambda x, t: predictions.from_x_0(schedule, x, t, x), 0.2, 0.5)
    x = jnp.array([[-1.0, 0.3, 2.0]])
    close(f(x, jnp.array([3])).x_0, [[0.2, 0.3, 0.5]], rtol=1e-6)


def test_network_reads_as_eps_unless_set():
    schedule = schedules.linear(10)
    x, t = jnp.ones((2, 3)), jnp.array([1, 10])
    network = lambda x, t: 0.1 * x * t[:, None]  # noqa: E731
    assert (denoiser(schedule, network)(x, t).eps == network(x, t)).all()
    read = denoiser(schedule, network, predictions.from_x_0)
    assert (read(x, t).x_0 == network(x, t)).all()


@pytest.mark.parametrize("name", READINGS)
def test_output_of_another_shape_is_refused(name):
    schedule, x_t = schedules.linear(10), jnp.ones((2, 3, 3))
    for shape in [(2, 3, 1), (1, 3, 3), (2, 3, 6), (2, 3)]:
        with pytest.raises(ValueError, match="shapes must be equal"):
            READINGS[name](schedule, x_t, jnp.array([1, 2]), jnp.ones(shape))


def test_posterior_mean_of_another_shape_is_refused():
    x_0 = jnp.ones((2, 3, 1))
    with pytest.raises(ValueError, match="shapes must be equal"):
        predictions.to_posterior_mean(
            schedules.linear(10), jnp.ones((2, 3, 3)), jnp.array([1, 2]), Prediction(x_0, x_0)
        )


@pytest.mark.parametrize("reading", [None, predictions.from_score])
@pytest.mark.parametrize("schedule", [schedules.jsd(10), schedules.constant(1000, 0.5)])
def test_eps_needs_some_signal_at_the_end(schedule, reading):
    with pytest.raises(ValueError, match="no signal at t = T = 10"):
        predictions.denoiser(schedule, lambda x_t, t: x_t, reading)
    predictions.denoiser(schedule, lambda x_t, t: x_t, predictions.from_v)


def test_posterior_mean_of_any_step():
    schedule, exact = pair("linear", 1000)
    s, t = np.array([0, 3, 500]), np.array([5, 700, 1000])
    x_0, x_t = np.float32(np.random.default_rng(4).normal(size=(2, 3, 2)))
    of_x_0, of_x_t, _ = (x[:, None] for x in exact.posterior(s, t))
    mean = np.float32(of_x_0 * x_0 + of_x_t * x_t)
    close(predictions.from_posterior_mean(schedule, x_t, t, mean, s=s).x_0, x_0, rtol=2e-4)


def test_preconditioning_of_karras():
    """In his terms, x = x_t/alpha and sigma: D = c_skip x + c_out F(c_in x, log(sigma)/4)."""
    schedule, exact = pair("cosine", 50)
    t = np.arange(1, 51)
    x_t = np.float32(np.random.default_rng(3).normal(size=(50, 3)))
    network = lambda x, c: jnp.tanh(2 * x) + c[:, None]  # noqa: E731
    found = jax.jit(predictions.preconditioned(schedule, network, sigma_data=0.7))(x_t, t)
    sigma = (exact.sigma / np.where(exact.alpha == 0, np.nan, exact.alpha))[t][:, None]
    x = x_t * np.sqrt(1 + sigma**2)
    total = sigma**2 + 0.7**2
    f = np.tanh(2 * x / np.sqrt(total)) + np.log(sigma) / 4
    d = 0.7**2 / total * x + sigma * 0.7 / np.sqrt(total) * f
    close(found.x_0, d, rtol=1e-4, atol=1e-5)
    close(jax.jit(q_sample)(schedule, found.x_0, t, found.eps), x_t, atol=1e-5)


def test_preconditioned_network_sees_and_is_asked_for_unit_variance():
    """Of data with sigma_data, at every noise level; and EDM's weight makes its loss plain."""
    schedule, exact = pair("linear", 50)
    t = np.arange(1, 51)
    x_0, eps = (
        jax.random.normal(jax.random.key(0), (2, 50, 4000)) * np.array([0.7, 1])[:, None, None]
    )
    x_t = q_sample(schedule, x_0, t, eps)
    seen = {}

    def network(x, c):
        seen["x"] = x
        return jnp.zeros_like(x)

    weight = loss_weights.edm(0.7)(schedule.log_snr[t])[:, None]
    skip = predictions.preconditioned(schedule, network, sigma_data=0.7)(x_t, t)
    wanted = (x_0 - skip.x_0) * jnp.sqrt(weight)  # by c_out, of either sign
    close(seen["x"].std(axis=1), 1, rtol=0.05)
    close(wanted.std(axis=1), 1, rtol=0.05)
    # The best for such Gaussian data is no network at all.
    close(skip.x_0, gaussian_denoiser(exact, 0.0, 0.49)(x_t, t).x_0, rtol=1e-3, atol=1e-4)


def test_preconditioning_needs_some_signal_at_the_end():
    with pytest.raises(ValueError, match="sigma is infinite"):
        predictions.preconditioned(schedules.jsd(10), lambda x, c: x)
    wrong = predictions.preconditioned(schedules.linear(10), lambda x, c: x[:, :1])
    with pytest.raises(ValueError, match="shapes must be equal"):
        wrong(jnp.ones((2, 3)), jnp.array([1, 2]))


def schedules_with(log_snr):
    """Ways to have it: continuous, of a table between its times, of a batch as it is learned."""
    found = {
        "linear": continuous.linear(15.0, -12.0),
        "cosine": continuous.cosine(),
        "table": schedules.linear(1000),
        "levels": continuous.Levels(jnp.float32(log_snr), jnp.zeros_like(log_snr)),
    }
    for name, schedule in found.items():
        t = jnp.zeros_like(log_snr) if name == "levels" else schedule.time_of(log_snr)
        yield schedule, t


@pytest.mark.parametrize("name", [*list(READINGS)[:4], "preconditioned"])  # of a single time
def test_given_log_snr_a_network_says_the_same_of_any_schedule(name):
    """At one log-SNR, whatever the time there: the whole denoiser, by each reading of it."""
    log_snr = np.float32([8.0, 3.5, 0.0, -2.0, -9.0])
    x_t = np.float32(np.random.default_rng(6).normal(size=(5, 4)))
    seen, said = [], []

    def network(x, time):
        seen.append(time)
        return jnp.tanh(x * jnp.cos(time / 50)[:, None])

    for schedule, t in schedules_with(log_snr):
        if name == "preconditioned":
            denoise = predictions.preconditioned(schedule, network)
        else:
            by = predictions.conditioned_on_log_snr(schedule, network)
            denoise = denoiser(schedule, by, READINGS[name])
        said.append(denoise(x_t, t))
    expected = -log_snr / 8 if name == "preconditioned" else 25 * (20 - log_snr)
    alpha, sigma = 1 / np.sqrt(1 + np.exp(-log_snr)), 1 / np.sqrt(1 + np.exp(log_snr))
    for time, found in zip(seen, said, strict=True):
        close(time, expected, rtol=1e-5, atol=1e-2)
        # Divided by alpha or sigma, which amplifies the rounding of the time.
        slack = {"rtol": 2e-3, "atol": 2e-3}
        close(found.x_0 * alpha[:, None], said[0].x_0 * alpha[:, None], **slack)
        close(found.eps * sigma[:, None], said[0].eps * sigma[:, None], **slack)


def test_log_snr_is_given_in_0_to_1000_and_not_beyond():
    log_snr = jnp.array([np.inf, 25.0, 20.0, 10.0, -20.0, -21.0, -np.inf])
    conditioned = predictions.conditioned_on_log_snr(
        continuous.Levels(log_snr, log_snr), lambda x_t, t: t
    )
    assert (
        conditioned(jnp.zeros(7), jnp.zeros(7)) == jnp.array([0, 0, 0, 250, 1000, 1000, 1000])
    ).all()


@pytest.mark.parametrize("make", [schedules.linear, schedules.geometric], ids=lambda f: f.__name__)
def test_noise_unconditional_network_is_ncsns(make):
    """It is given y alone; as a score it is f(y)/s, and L_simple its loss of weight s^2."""
    schedule, t = make(100), jnp.arange(1, 101)
    rng, seen = np.random.default_rng(8), []
    x_0, eps = np.float32(rng.normal(size=(2, 100, 3)))
    weights = np.float32(rng.normal(size=(3, 3)))

    def network(y, time):
        seen.append((y, time))
        return jnp.tanh(y @ weights)

    denoise = denoiser(schedule, predictions.noise_unconditional(schedule, network))
    found = losses.simple(schedule, denoise, x_0, t, eps)
    (y, time), s = seen.pop(), jnp.exp(-0.5 * schedule.log_snr[1:])[:, None]
    close(y, x_0 + s * eps, rtol=2e-5, atol=1e-5)
    assert time.shape == t.shape
    assert not time.any()

    ncsn = lambda y, t: -jnp.tanh(y @ weights) / s  # noqa: E731
    close(score.denoising_exploding(schedule, ncsn, x_0, t, eps), found, rtol=1e-4)
    of_x_t = score.preserving(schedule, ncsn)
    close(score.denoising(schedule, of_x_t, x_0, t, eps), found, rtol=1e-4)
    with pytest.raises(ValueError, match="where y = x_t / alpha_t is infinite"):
        predictions.noise_unconditional(schedules.jsd(10), network)


def test_the_name_of_a_parameterization_is_none():
    with pytest.raises(TypeError, match=r"^parameterization is 'v': pass one of ddpm\.predictions"):
        denoiser(schedules.linear(5), lambda x, t: x, "v")


def test_posterior_mean_is_of_whole_times():
    """At other times, which the command refuses, its x_0 is not a number or wrong."""
    schedule, x = schedules.linear(10), jnp.ones((2, 3))
    read = denoiser(schedule, lambda x, t: x, predictions.from_posterior_mean)
    assert np.isfinite(read(x, np.float32([4, 5])).x_0).all()
    for call in (read, jax.jit(read)):
        with pytest.raises(ValueError, match="the step from t to t - 1, and t is fractional"):
            call(x, np.float32([4, 4.5]))
    mean = predictions.from_posterior_mean(schedule, x, np.full(2, 4.5), x, s=np.full(2, 2.0))
    assert np.isfinite(mean.x_0).all()
