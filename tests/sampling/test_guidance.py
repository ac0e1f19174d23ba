"""Guidance on a Gaussian mixture, whose classes, and their posterior, are known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm import (
    ancestral,
    classifier_free,
    classifier_guided,
    clipped,
    ddim,
    fixed_small,
    guidance,
    predictions,
    sample,
    schedules,
    thresholded,
)
from ddpm.diffusion.schedules import NoiseSchedule
from tests.exact import close, gaussian_denoiser, mixture_denoiser, pair, per_example

T = 40
WEIGHTS = np.array([0.5, 0.3, 0.2])
MEANS = np.array([[-0.7, 0.0, 0.1], [0.5, 0.6, -0.2], [0.4, -0.7, 0.0]])
VARIANCE = 0.02
SCHEDULE, EXACT = pair("cosine", T)
ANY = mixture_denoiser(EXACT, WEIGHTS, MEANS, VARIANCE)


def of_class(label):
    return gaussian_denoiser(EXACT, jnp.asarray(MEANS, jnp.float32)[label], VARIANCE)


def log_posterior(label):
    """log p(y | x_t) by Bayes' rule, label [B]."""

    def log_probability(x_t, t):
        alpha, sigma = (per_example(jnp.float32(a)[t], x_t) for a in (EXACT.alpha, EXACT.sigma))
        spread = alpha**2 * VARIANCE + sigma**2
        distance = ((x_t[:, None] - alpha[..., None] * jnp.float32(MEANS)) ** 2).sum(-1)
        logits = jnp.log(jnp.float32(WEIGHTS)) - 0.5 * distance / spread
        return jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], axis=1)[:, 0]

    return log_probability


def at_all_times(seed=0):
    """x_t of the mixture at every t, and a class for each."""
    rng = np.random.default_rng(seed)
    t = np.arange(1, T + 1)
    x_0 = MEANS[rng.choice(3, T, p=WEIGHTS)] + VARIANCE**0.5 * rng.normal(size=(T, 3))
    x_t = EXACT.alpha[t][:, None] * x_0 + EXACT.sigma[t][:, None] * rng.normal(size=(T, 3))
    return jnp.float32(x_t), jnp.asarray(t), jnp.asarray(rng.integers(0, 3, T))


X_T, TIMES, LABEL = at_all_times()


def evaluate(denoiser):
    return jax.jit(denoiser)(X_T, TIMES)


def same(a, b, **tolerance):
    for x, y in zip(a[:2], b[:2], strict=True):
        close(x, y, **tolerance)


WRAPPERS = {
    "classifier_free": lambda: classifier_free(SCHEDULE, of_class(LABEL), ANY, 3.0),
    "away": lambda: classifier_free(SCHEDULE, of_class(LABEL), ANY, -1.5),
    "per_sample": lambda: classifier_free(SCHEDULE, of_class(LABEL), ANY, jnp.linspace(-2, 5, T)),
    "interval": lambda: classifier_free(SCHEDULE, of_class(LABEL), ANY, 4.0, interval=(0.3, 3.0)),
    "rescaled": lambda: classifier_free(SCHEDULE, of_class(LABEL), ANY, 5.0, rescale=0.7),
    "classifier": lambda: classifier_guided(SCHEDULE, ANY, log_posterior(LABEL), 2.0),
    "of_x_0": lambda: classifier_guided(
        SCHEDULE, ANY, guidance.of_x_0(ANY, lambda x_0: -((x_0 - 0.3) ** 2).sum(1)), 2.0
    ),
    "thresholded": lambda: thresholded(SCHEDULE, loud(ANY), 0.6),
}


def loud(denoiser):
    """With an x_0 far beyond the data's range, other for each sample."""

    def denoise(x_t, t):
        x_0 = denoiser(x_t, t).x_0 * jnp.linspace(0.1, 4, len(x_t))[:, None]
        return predictions.from_x_0(SCHEDULE, x_t, t, x_0)

    return denoise


@pytest.mark.parametrize("name", WRAPPERS)
def test_x_0_and_eps_belong_to_the_same_x_t(name):
    found = evaluate(WRAPPERS[name]())
    alpha, sigma = EXACT.alpha[TIMES][:, None], EXACT.sigma[TIMES][:, None]
    x_0, eps = np.float64(found.x_0), np.float64(found.eps)
    scale = 1 + np.abs(alpha * x_0) + np.abs(sigma * eps)
    assert (np.abs(alpha * x_0 + sigma * eps - X_T) / scale).max() < 3e-6
    # It is not what was wrapped that has come back.
    assert np.abs(x_0 - evaluate(ANY).x_0).max() > 0.1


def test_scale_1_is_the_conditional_and_0_the_unconditional():
    guided = jax.jit(lambda w: classifier_free(SCHEDULE, of_class(LABEL), ANY, w)(X_T, TIMES))
    same(guided(1.0), evaluate(of_class(LABEL)), rtol=1e-6, atol=1e-6)
    same(guided(0.0), evaluate(ANY), rtol=1e-6, atol=1e-6)


def test_guided_eps_is_the_formula_and_each_sample_has_its_scale():
    eps_c, eps_u = (np.float64(evaluate(d).eps) for d in (of_class(LABEL), ANY))
    scales = np.linspace(-2, 5, T)
    expected = eps_u + scales[:, None] * (eps_c - eps_u)
    close(evaluate(WRAPPERS["per_sample"]()).eps, expected, rtol=1e-5, atol=1e-5)


def test_guidance_is_that_by_the_classifier_that_the_two_denoisers_imply():
    """eps_c - eps_u = -sigma grad log p(y | x_t), so the two kinds agree at every scale."""
    for scale in (-1.0, 0.5, 3.0):
        free = evaluate(classifier_free(SCHEDULE, of_class(LABEL), ANY, scale))
        guided = evaluate(classifier_guided(SCHEDULE, ANY, log_posterior(LABEL), scale))
        same(guided, free, rtol=2e-4, atol=2e-4)


def test_the_exact_posterior_at_scale_1_gives_the_denoiser_of_the_class():
    guided = evaluate(classifier_guided(SCHEDULE, ANY, log_posterior(LABEL), 1.0))
    same(guided, evaluate(of_class(LABEL)), rtol=1e-4, atol=1e-4)
    each = classifier_guided(SCHEDULE, ANY, log_posterior(LABEL), jnp.arange(T) % 2)
    same(
        [x[1::2] for x in evaluate(each)[:2]],
        [x[1::2] for x in evaluate(of_class(LABEL))[:2]],
        rtol=1e-4,
        atol=1e-4,
    )
    same([x[::2] for x in evaluate(each)[:2]], [x[::2] for x in evaluate(ANY)[:2]], rtol=1e-6)


def test_a_classifier_of_x_0_is_differentiated_through_the_denoiser():
    """x_0 of N(m, v) is m + alpha v (x_t - alpha m) / (alpha^2 v + sigma^2): the slope is known."""
    direction = np.float32([1.0, -2.0, 0.5])
    normal = gaussian_denoiser(EXACT, 0.2, 0.3)
    log_p = guidance.of_x_0(normal, lambda x_0: x_0 @ direction)
    found = evaluate(classifier_guided(SCHEDULE, normal, log_p, 1.5)).eps - evaluate(normal).eps
    alpha, sigma = EXACT.alpha[TIMES][:, None], EXACT.sigma[TIMES][:, None]
    slope = alpha * 0.3 / (alpha**2 * 0.3 + sigma**2)
    close(found, -1.5 * sigma * slope * direction, rtol=1e-3, atol=1e-5)


def test_interval_is_open_below_and_closed_above():
    """sigma / alpha = e^-1, 1 and e; outside it is the conditional, whatever the other says."""
    log_snr = jnp.array([jnp.inf, 2.0, 0.0, -2.0])
    schedule = NoiseSchedule(log_snr, jnp.zeros(4))
    one = lambda x_0: lambda x_t, t: predictions.from_x_0(schedule, x_t, t, x_0 + 0 * x_t)  # noqa: E731
    x_t, t = jnp.zeros((3, 2)), jnp.array([1, 2, 3])
    for interval, inside in (
        ((0.5, 1.0), [False, True, False]),
        ((1.0, 5.0), [False, False, True]),
        ((0.0, 1.0), [True, True, False]),
        ((1.0, np.inf), [False, False, True]),
        ((5.0, 6.0), [False, False, False]),
    ):
        denoise = classifier_free(schedule, one(0.5), one(0.2), 3.0, interval=interval)
        found = jax.jit(denoise)(x_t, t).x_0[:, 0]
        close(found, np.where(inside, 0.2 + 3 * 0.3, 0.5), rtol=1e-6)


def test_outside_the_interval_the_unconditional_is_not_computed():
    calls = []

    def counted(x_t, t):
        jax.debug.callback(lambda: calls.append(1))
        return ANY(x_t, t)

    denoise = classifier_free(SCHEDULE, of_class(LABEL), counted, 3.0, interval=(0.5, 2.0))
    ratio = EXACT.sigma[1:] / EXACT.alpha[1:]
    step = jax.jit(lambda t: denoise(X_T, jnp.full(T, t)))
    for t in (1, T):
        step(t)
    jax.effects_barrier()
    assert not calls
    step(int(np.argmax(ratio > 1)) + 1)
    jax.effects_barrier()
    assert calls


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescaled_x_0_has_the_spread_of_the_conditional(phi):
    plain = np.float64(evaluate(classifier_free(SCHEDULE, of_class(LABEL), ANY, 6.0)).x_0)
    wanted = np.float64(evaluate(of_class(LABEL)).x_0).std(axis=1)
    found = evaluate(classifier_free(SCHEDULE, of_class(LABEL), ANY, 6.0, rescale=phi)).x_0
    mixed = phi * wanted + (1 - phi) * plain.std(axis=1)
    close(np.float64(found).std(axis=1), mixed, rtol=1e-4)
    assert np.abs(plain.std(axis=1) / wanted - 1).max() > 0.2
    # Multiplied, not shifted.
    close(found, plain * (mixed / plain.std(axis=1))[:, None], rtol=1e-3, atol=1e-5)


def test_rescaling_a_single_pixel_changes_nothing():
    one = lambda x_0: lambda x_t, t: predictions.from_x_0(SCHEDULE, x_t, t, x_0 + 0 * x_t)  # noqa: E731
    found = jax.jit(classifier_free(SCHEDULE, one(0.5), one(0.1), 2.0, rescale=1.0))(
        jnp.ones((2, 1)), jnp.array([3, 30])
    )
    close(found.x_0, 0.9, rtol=1e-6)


def test_a_learned_variance_is_that_of_the_conditional():
    with_variance = lambda d, v: lambda x, t: d(x, t)._replace(log_variance=jnp.full_like(x, v))  # noqa: E731
    pair_of = with_variance(of_class(LABEL), -1.0), with_variance(ANY, -2.0)
    for denoiser in (
        classifier_free(SCHEDULE, *pair_of, 3.0, rescale=0.5),
        classifier_free(SCHEDULE, *pair_of, 3.0, interval=(0.5, 2)),
        classifier_guided(SCHEDULE, pair_of[0], log_posterior(LABEL), 2.0),
        thresholded(SCHEDULE, pair_of[0]),
    ):
        assert (evaluate(denoiser).log_variance == -1).all()


@pytest.mark.parametrize("percentile", [0.5, 0.995, 1.0])
def test_threshold_is_numpys_quantile(percentile):
    """Of each sample by itself; one that is within the range is as it was."""
    x_0 = np.float32(np.random.default_rng(3).normal(size=(T, 4, 3, 2)))
    x_0 *= np.linspace(0.05, 4, T, dtype=np.float32).reshape(T, 1, 1, 1)
    x_t = np.float32(np.random.default_rng(4).normal(size=x_0.shape))
    raw = lambda x_t, t: predictions.from_x_0(SCHEDULE, x_t, t, jnp.asarray(x_0))  # noqa: E731
    found = jax.jit(thresholded(SCHEDULE, raw, percentile))(x_t, TIMES)
    for i, x in enumerate(x_0):
        s = max(np.quantile(np.abs(x), percentile), 1.0)
        close(found.x_0[i], x.clip(-s, s) / s, rtol=1e-5, atol=1e-6)
    close(found.x_0[0], x_0[0], rtol=1e-6)
    assert np.abs(found.x_0).max() <= 1
    if percentile == 1.0:
        return
    static = jax.jit(clipped(SCHEDULE, raw))(x_t, TIMES).x_0
    assert (np.abs(found.x_0) < 1).mean() > (np.abs(static) < 1).mean() + 0.02


def share_of_class(denoiser, label, n=400, sampler=None):
    """How many samples are nearest to each class's mean, and the samples."""
    x_0 = jax.jit(
        lambda key: sample(
            key, SCHEDULE, denoiser, (n, 3), sampler=sampler or ancestral(fixed_small)
        )
    )(jax.random.key(1))
    nearest = ((np.asarray(x_0)[:, None] - MEANS) ** 2).sum(-1).argmin(axis=1)
    return (nearest == label).mean(), np.asarray(x_0)


def test_guided_chains_reach_the_class():
    everyone = jnp.full(400, 2)
    unguided, _ = share_of_class(ANY, 2)
    assert abs(unguided - WEIGHTS[2]) < 0.07
    share, x_0 = share_of_class(classifier_guided(SCHEDULE, ANY, log_posterior(everyone), 1.0), 2)
    assert share > 0.98
    close(x_0.mean(axis=0), MEANS[2], atol=0.04)
    for scale, least in ((1.0, 0.98), (3.0, 0.995)):
        free = classifier_free(SCHEDULE, of_class(everyone), ANY, scale)
        assert share_of_class(free, 2)[0] > least
    # Away from a class, by a negative scale or as what is led away from.
    away = classifier_free(SCHEDULE, of_class(everyone), ANY, -1.0)
    assert share_of_class(away, 2, sampler=ddim(steps=20))[0] < 0.02
    negative = classifier_free(SCHEDULE, ANY, of_class(everyone), 2.0)
    assert share_of_class(negative, 2, sampler=ddim(steps=20))[0] < 0.02


def test_guidance_leads_away_from_the_other_classes():
    """At w > 1, p(x) p(y | x)^w has less than p(x | y) of what another class could be."""
    everyone = jnp.full(400, 0)
    towards = [
        share_of_class(classifier_free(SCHEDULE, of_class(everyone), ANY, w), 0)[1] for w in (1, 4)
    ]
    apart = [np.linalg.norm(x.mean(axis=0) - MEANS[1:].mean(axis=0)) for x in towards]
    assert apart[1] > apart[0] + 0.01


def test_guidance_needs_no_signal_at_t_T():
    """With v, whose x_0 is known where alpha_T = 0, classifier-free guidance stays finite."""
    schedule = schedules.jsd(5)
    reading = lambda v: lambda x, t: predictions.from_v(schedule, x, t, v + 0 * x)  # noqa: E731
    denoise = classifier_free(schedule, reading(0.3), reading(-0.2), 4.0, rescale=0.5)
    x_t = jnp.float32([[0.5, -1.0]])
    found = jax.jit(denoise)(x_t, jnp.array([5]))
    assert np.isfinite(found.x_0).all()
    close(found.eps, x_t, rtol=1e-6)
    with pytest.raises(ValueError, match="leaves no signal at t = T = 5"):
        classifier_guided(schedule, reading(0.3), lambda x, t: x.sum(1), 1.0)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: classifier_free(SCHEDULE, ANY, ANY, 2.0, interval=(2, 1)), r"0 <= lo < hi"),
        (lambda: classifier_free(SCHEDULE, ANY, ANY, 2.0, interval=(-1, 1)), r"0 <= lo < hi"),
        (lambda: classifier_free(SCHEDULE, ANY, ANY, 2.0, rescale=1.5), r"between 0 \(off\) and 1"),
        (lambda: thresholded(SCHEDULE, ANY, 99.5), r"percentile = 99.5: must be in \(0, 1\]"),
        (lambda: classifier_free(SCHEDULE, ANY, ANY, jnp.ones(3))(X_T, TIMES), "40 values"),
    ],
)
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
