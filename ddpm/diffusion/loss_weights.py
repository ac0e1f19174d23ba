"""Weights of the squared error over noise levels, each one function of the log-SNR.

All are multipliers of |x_0 - x_0_hat|^2, so that each says the same of whatever the network puts
out; those of other errors follow from (SNR = alpha^2/sigma^2)

    |eps - eps_hat|^2 = SNR |x_0 - x_0_hat|^2,    |v - v_hat|^2 = (SNR + 1) |x_0 - x_0_hat|^2.

On x_0 all are finite at any noise level, also with no signal left (SNR = 0).
Each takes log_snr of any shape. `losses.weighted` makes a loss of one.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Weight = Callable[[jax.Array], jax.Array]


def on_eps(weight: Weight, log_snr: jax.Array) -> jax.Array:
    """Returns the multiplier of |eps - eps_hat|^2 that is the same weight."""
    return weight(log_snr) * jnp.exp(-log_snr)


def on_v(weight: Weight, log_snr: jax.Array) -> jax.Array:
    """Returns the multiplier of |v - v_hat|^2 that is the same weight."""
    return weight(log_snr) * jax.nn.sigmoid(-log_snr)


def simple(log_snr: jax.Array) -> jax.Array:
    """Returns the weight of L_simple, which is 1 on eps (Ho et al. 2020, Eq. 14)."""
    return jnp.exp(log_snr)


def x_0(log_snr: jax.Array) -> jax.Array:
    """Returns 1, on x_0."""
    return jnp.ones_like(log_snr)


def v(log_snr: jax.Array) -> jax.Array:
    """Returns the weight that is 1 on v: SNR + 1 (Salimans & Ho 2022)."""
    return jnp.exp(log_snr) + 1


def min_snr(gamma: float = 5.0) -> Weight:
    """Returns the weight min(SNR, gamma) (Hang et al. 2023)."""
    _positive("gamma", gamma)
    return lambda log_snr: jnp.minimum(jnp.exp(log_snr), gamma)


def truncated_snr(log_snr: jax.Array) -> jax.Array:
    """Returns max(SNR, 1) (Salimans & Ho 2022)."""
    return jnp.maximum(jnp.exp(log_snr), 1.0)


def p2(gamma: float = 1.0, k: float = 1.0) -> Weight:
    """Returns the weight 1/(k + SNR)^gamma on eps (Choi et al. 2022)."""
    _positive("k", k)
    return lambda log_snr: jnp.exp(log_snr) / (k + jnp.exp(log_snr)) ** gamma


def sigmoid(bias: float = 0.0) -> Weight:
    """Returns the weight sigmoid(bias - log_snr) on eps (Kingma & Gao 2023), of the bound's
    integral.

    That is over log-SNR, whatever the schedule: `losses.weighted(.., over_log_snr=True)`.
    """
    # SNR sigmoid(bias - log_snr), with nothing that overflows.
    return lambda log_snr: jnp.exp(bias + jax.nn.log_sigmoid(log_snr - bias))


def edm(sigma_data: float = 0.5) -> Weight:
    """Returns (sigma^2 + sigma_data^2)/(sigma sigma_data)^2, sigma^2 = 1/SNR (Karras et al. 2022,
    Table 1).

    With sigma_data = 1 it is `v`.
    """
    _positive("sigma_data", sigma_data)
    return lambda log_snr: jnp.exp(log_snr) + sigma_data**-2


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} = {value}: must be > 0")
