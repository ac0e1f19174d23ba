"""Markov chain Monte Carlo on any density: unadjusted Langevin, MALA and HMC, all chains at once.

    target = mcmc.target(lambda x: -0.5 * (x**2).sum(-1))       # log p up to a constant, [B]
    found = mcmc.run(mcmc.mala, target, keys, x, step_size=0.5, steps=1000, burn_in=200)

A **target** is a function x [B, ...] -> (log p [B], its gradient [B, ...]), log p up to a constant.
A **kernel** is a function (target, keys [B], state, step_size) -> (state, acceptance
[B]); every chain is accepted or not on its own, and draws from its own key, so that it is the same
in whatever batch. Step sizes are one for all, or [B].
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ddpm.diffusion.gaussian import expand_like, same_shape
from ddpm.diffusion.streams import normal
from ddpm.diffusion.times import whole_number

Target = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


class State(NamedTuple):
    """The places of chains, x [B, ...], with log p [B] and its gradient there."""

    x: jax.Array
    log_density: jax.Array
    gradient: jax.Array


Kernel = Callable[[Target, jax.Array, State, jax.Array], tuple[State, jax.Array]]


class Found(NamedTuple):
    """The chains after their steps; how often each accepted after its burn-in, [B]; and the step
    size that each ended with, [B]."""

    state: State
    acceptance: jax.Array
    step_size: jax.Array


# Streams of a chain's step.
_MOVE, _COIN = range(2)


def target(log_density: Callable[[jax.Array], jax.Array]) -> Target:
    """Returns the target of a log-density: a function x [B, ...] -> [B] that treats each example by
    itself."""

    def of(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, pullback = jax.vjp(log_density, x)
        (gradient,) = pullback(jnp.ones_like(value))
        return value, gradient

    return of


def at(target: Target, x: jax.Array) -> State:
    """Returns the state of chains at x [B, ...]."""
    return State(x, *target(x))


def langevin_step(
    score: jax.Array, x: jax.Array, step_size: jax.typing.ArrayLike, noise: jax.Array
) -> jax.Array:
    """Returns x + h score + sqrt(2 h) noise, the unadjusted Langevin algorithm."""
    same_shape(score=score, x=x, noise=noise)
    return x + step_size * score + jnp.sqrt(2 * step_size) * noise


def ula(
    target: Target, keys: jax.Array, state: State, step_size: jax.Array
) -> tuple[State, jax.Array]:
    """Returns the chains after x + h grad + sqrt(2 h) z, the unadjusted Langevin algorithm.

    Always accepted. On N(0, v) its stationary variance is v / (1 - h / (2 v)).
    """
    x = _langevin(keys, state, step_size)
    return at(target, x), jnp.ones(len(x))


def mala(
    target: Target, keys: jax.Array, state: State, step_size: jax.Array
) -> tuple[State, jax.Array]:
    """Returns the chains after a step of the Metropolis-adjusted Langevin algorithm, which leaves
    the target as it is (Roberts & Tweedie 1996), and their probabilities of acceptance."""
    proposed = at(target, _langevin(keys, state, step_size))
    return _accepted(keys, state, proposed, log_ratio(state, proposed, step_size))


def log_ratio(state: State, proposed: State, step_size: jax.Array) -> jax.Array:
    """Returns log of p(x') q(x | x') / (p(x) q(x' | x)) of a Langevin proposal x' [B], where
    q(x' | x) = N(x + h grad log p(x), 2 h): the acceptance of MALA is min(1, that)."""

    def log_q(to: State, of: State) -> jax.Array:
        away = to.x - of.x - expand_like(step_size, of.x) * of.gradient
        return -_sum(away**2) / (4 * step_size)

    density = proposed.log_density - state.log_density
    return density + log_q(state, proposed) - log_q(proposed, state)


def hmc(leapfrogs: int = 5) -> Kernel:
    """Returns the kernel of Hamiltonian Monte Carlo with so many leapfrog steps of size sqrt(2 h)
    (Duane et al. 1987; Neal 2011): with one it is MALA.

    Raises ValueError unless leapfrogs >= 1.
    """
    whole_number("leapfrogs", leapfrogs)

    def kernel(
        target: Target, keys: jax.Array, state: State, step_size: jax.Array
    ) -> tuple[State, jax.Array]:
        momentum = normal(keys, _MOVE, state.x.shape[1:]).astype(state.x.dtype)
        proposed, turned = leapfrog(target, state, momentum, step_size, leapfrogs)
        energy = proposed.log_density - state.log_density
        energy += (_sum(momentum**2) - _sum(turned**2)) / 2
        return _accepted(keys, state, proposed, energy)

    return kernel


def leapfrog(
    target: Target, state: State, momentum: jax.Array, step_size: jax.Array, steps: int
) -> tuple[State, jax.Array]:
    """Returns position and momentum [B, ...] after leapfrog steps of size sqrt(2 step_size): they
    preserve volume, and from -momentum lead back."""
    time = expand_like(jnp.sqrt(2 * jnp.asarray(step_size)), state.x)

    def one(_: jax.Array, carried: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
        here, momentum = carried
        half = momentum + time / 2 * here.gradient
        there = at(target, here.x + time * half)
        return there, half + time / 2 * there.gradient

    moved: tuple[State, jax.Array] = jax.lax.fori_loop(0, steps, one, (state, momentum))
    return moved


def run(
    kernel: Kernel,
    target: Target,
    keys: jax.Array,
    x: jax.Array,
    *,
    step_size: jax.typing.ArrayLike,
    steps: int,
    burn_in: int = 0,
    aim: float = 0.574,
) -> Found:
    """Runs chains from x [B, ...] for burn_in + steps steps; `keys` [B] are one for each.

    In the burn-in each chain adapts its step size to accept with probability `aim`, by a Robbins-
    Monro rule on its logarithm; afterwards it stays, for only then the target is kept. The default
    is the best for MALA in many dimensions (Roberts & Rosenthal 1998); HMC's is 0.65, and for ULA,
    which always accepts, give no burn-in.
    """
    start = at(target, x)
    sizes = jnp.broadcast_to(jnp.asarray(step_size, x.dtype), x.shape[:1])

    def one(k: jax.Array, carried: Found) -> Found:
        state, total, sizes = carried
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, k)
        state, accepted = kernel(target, own, state, sizes)
        gain = (k < burn_in) / jnp.sqrt(k + 1.0)
        sizes = sizes * jnp.exp(gain * (accepted - aim)).astype(sizes.dtype)
        return Found(state, total + (k >= burn_in) * accepted, sizes)

    begun = Found(start, jnp.zeros(len(x)), sizes)
    found: Found = jax.lax.fori_loop(0, burn_in + steps, one, begun)
    return found._replace(acceptance=found.acceptance / max(steps, 1))


def _langevin(keys: jax.Array, state: State, step_size: jax.Array) -> jax.Array:
    noise = normal(keys, _MOVE, state.x.shape[1:]).astype(state.x.dtype)
    return langevin_step(state.gradient, state.x, expand_like(step_size, state.x), noise)


def _accepted(
    keys: jax.Array, state: State, proposed: State, log_ratio: jax.Array
) -> tuple[State, jax.Array]:
    """Returns the proposed states where a coin of their own probability falls so, else the states
    before; and the probabilities. A proposal that is not finite is never accepted."""
    log_ratio = jnp.where(jnp.isfinite(log_ratio), log_ratio, -jnp.inf)
    coin = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, _COIN)))(keys)
    taken = jnp.log(coin) < log_ratio
    new = jax.tree.map(lambda a, b: jnp.where(expand_like(taken, a), a, b), proposed, state)
    return new, jnp.exp(jnp.minimum(log_ratio, 0.0))


def _sum(x: jax.Array) -> jax.Array:
    return x.sum(axis=range(1, x.ndim))
