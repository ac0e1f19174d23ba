"""Float64 NumPy oracles: processes straight from their betas, and closed-form denoisers.

Nothing here goes by the log-SNR, so that an error in the library's way round is not repeated.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm import Prediction, schedules

# NaN equals nothing.
close = functools.partial(np.testing.assert_allclose, equal_nan=False)


class Process:
    """q by the paper's formulas in float64; arrays over t = 0..T, methods for times s < t."""

    def __init__(self, betas):
        betas = np.asarray(betas, np.float64)
        self.betas = betas
        self.beta = np.concatenate([[0.0], betas])
        self.alpha_bar = np.concatenate([[1.0], np.cumprod(1 - betas)])
        self.num_steps = len(betas)
        self.alpha = np.sqrt(self.alpha_bar)
        # 1 - (1 - b)(1 - V) = b + (1 - b) V: adding up keeps the digits of small variances.
        variance = [0.0]
        for beta in betas:
            variance.append(beta + (1 - beta) * variance[-1])
        self.variance = np.array(variance)
        self.sigma = np.sqrt(self.variance)

    def step_beta(self, s, t):
        """Of x_t given x_s."""
        return 1 - self.alpha_bar[t] / self.alpha_bar[s]

    def posterior(self, s, t):
        """Factors of x_0 and of x_t in the mean, and the variance, of q(x_s | x_t, x_0)."""
        beta, ratio = self.step_beta(s, t), np.sqrt(self.alpha_bar[t] / self.alpha_bar[s])
        of_x_0 = beta * self.alpha[s] / self.variance[t]
        of_x_t = self.variance[s] * ratio / self.variance[t]
        return of_x_0, of_x_t, beta * self.variance[s] / self.variance[t]

    def log_variance(self, t):
        """log(1 - alpha_bar_t), also where that is nearly log 1."""
        return _log_one_minus(self.alpha_bar[t], self.variance[t])

    def log_step_beta(self, s, t):
        """Log of the step's beta, also where that is nearly log 1."""
        return _log_one_minus(self.alpha_bar[t] / self.alpha_bar[s], self.step_beta(s, t))

    def log_small(self, s, t):
        """Log of the posterior variance for s >= 1."""
        return self.log_step_beta(s, t) + self.log_variance(s) - self.log_variance(t)


def _log_one_minus(x, one_minus_x):
    with np.errstate(divide="ignore"):  # of the branch not taken
        return np.where(x < 0.5, np.log1p(-np.minimum(x, 0.5)), np.log(one_minus_x))


def _linear(num_steps):
    return 1e-4 + (0.02 - 1e-4) * np.arange(num_steps) / max(num_steps - 1, 1)


def _warmup(fraction, num_steps):
    rising = int(fraction * num_steps)
    betas = [0.02] * num_steps
    for i in range(rising):
        betas[i] = 1e-4 + (0.02 - 1e-4) * i / max(rising - 1, 1)
    return np.array(betas)


def _from_alpha_bar(alpha_bar, num_steps):
    alpha_bar = np.array([alpha_bar(t / num_steps) for t in range(num_steps + 1)])
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def _cosine(num_steps):
    return _from_alpha_bar(lambda u: np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2, num_steps)


def _sigmoid(num_steps):
    logistic = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    return _from_alpha_bar(
        lambda u: (logistic(3) - logistic(6 * u - 3)) / (logistic(3) - logistic(-3)), num_steps
    )


def _random(num_steps):
    rng = np.random.default_rng(0)
    return 10 ** rng.uniform(-5, -1.3 if num_steps > 100 else -0.05, num_steps)


BETAS = {
    "linear": _linear,
    "quadratic": lambda n: (0.01 + (0.02**0.5 - 0.01) * np.arange(n) / max(n - 1, 1)) ** 2,
    "constant": lambda n: np.full(n, 0.02),
    "jsd": lambda n: np.array([1 / (n - i) for i in range(n)]),
    "warmup10": lambda n: _warmup(0.1, n),
    "warmup50": lambda n: _warmup(0.5, n),
    "cosine": _cosine,
    "sigmoid": _sigmoid,
    "random": _random,
    "steep": lambda n: np.full(n, 0.13),  # alpha_bar_1000 = 1e-61, less than any float32
}
MAKERS = {
    "linear": schedules.linear,
    "quadratic": schedules.quadratic,
    "constant": schedules.constant,
    "jsd": schedules.jsd,
    "warmup10": schedules.warmup10,
    "warmup50": schedules.warmup50,
    "cosine": schedules.cosine,
    "sigmoid": schedules.sigmoid,
    "random": lambda n: schedules.from_betas(_random(n)),
    "steep": lambda n: schedules.constant(n, 0.13),
}
NAMES = list(MAKERS)


def pair(name, num_steps):
    """The library's schedule of this name, and the oracle's."""
    return MAKERS[name](num_steps), Process(BETAS[name](num_steps))


def per_example(coefficient, x):
    return jnp.reshape(coefficient, jnp.shape(coefficient) + (1,) * (x.ndim - 1))


class Levels(NamedTuple):
    """alpha and sigma over t = 0..T, as arguments of a compiled function."""

    alpha: jax.Array
    sigma: jax.Array


def levels(process):
    return Levels(*(jnp.asarray(x, jnp.float32) for x in (process.alpha, process.sigma)))


def _levels(process, t, x):
    """alpha and sigma at t; between two times log(alpha / sigma) is linear."""
    tables = levels(process)
    if jnp.issubdtype(jnp.result_type(t), jnp.integer):
        return (per_example(table[t], x) for table in tables)
    ratio = jnp.log(tables.alpha[1:] / tables.sigma[1:])
    ratio = jnp.exp(jnp.interp(t, jnp.arange(1.0, len(ratio) + 1), ratio))
    size = jnp.hypot(ratio, 1.0)
    return per_example(ratio / size, x), per_example(1 / size, x)


def gaussian_denoiser(process, mean=0.0, variance=1.0):
    """E[x_0 | x_t] and E[eps | x_t] for x_0 ~ N(mean, variance) in every dimension."""

    def denoise(x_t, t):
        alpha, sigma = _levels(process, t, x_t)
        centred = (x_t - alpha * mean) / (alpha**2 * variance + sigma**2)
        return Prediction(mean + alpha * variance * centred, sigma * centred)

    return denoise


def mixture_denoiser(process, weights, means, variance):
    """The same for a mixture of N(means[k], variance I); x is [B, D], means [K, D]."""
    means, log_weights = jnp.asarray(means, jnp.float32), jnp.log(jnp.asarray(weights))

    def denoise(x_t, t):
        alpha, sigma = _levels(process, t, x_t)
        spread = alpha**2 * variance + sigma**2
        centred = x_t[:, None, :] - alpha[..., None] * means
        logits = log_weights - 0.5 * (centred**2).sum(-1) / spread
        centred = (jax.nn.softmax(logits)[..., None] * centred).sum(1) / spread
        # By now the score with its sign turned, from which all follows (Tweedie).
        return Prediction((x_t - sigma**2 * centred) / alpha, sigma * centred)

    return denoise
