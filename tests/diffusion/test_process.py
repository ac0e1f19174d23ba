"""The driver of chains and the bound take any process: a discrete one, against its closed form.

Each of two coordinates is masked by time t with probability t/T; the exact denoiser knows the joint
distribution p. Two coordinates that are unmasked in one step, which happens with probability 1/T,
are drawn as if independent. So a chain's x_0 has the distribution (1 - 1/T) p + p_1 p_2 / T, and
the bound is H(p) + I(p)/T, I the mutual information.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm import likelihood, schedules
from ddpm.diffusion.process import GaussianDiffusion, Process, StepResult
from ddpm.sampling.sample import run_chain, sample_chain
from ddpm.sampling.samplers import ancestral, times
from tests.exact import close

T, LEVELS, MASK = 8, 3, 3
JOINT = np.array([[0.3, 0.05, 0.05], [0.05, 0.15, 0.1], [0.0, 0.1, 0.2]])


class Predicted(NamedTuple):
    x_0: jax.Array  # the expected value, [B, 2]
    probability: jax.Array  # [B, 2, LEVELS]


def exact(x_t, t):
    """p of each coordinate given the other, or its marginal where that is masked."""
    rows = jnp.concatenate([JOINT, JOINT.sum(axis=0)[None]])  # by the first coordinate or MASK
    columns = jnp.concatenate([JOINT.T, JOINT.T.sum(axis=0)[None]])
    found = jnp.stack([columns[x_t[:, 1]], rows[x_t[:, 0]]], axis=1)
    probability = found / found.sum(axis=-1, keepdims=True)
    return Predicted(probability @ jnp.arange(3.0), probability)


class Masking(NamedTuple):
    num_steps: int = T

    def noise(self, keys, stream, shape):
        folded = jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(stream, keys.shape))
        return jax.vmap(lambda key: jax.random.uniform(key, (*shape, 2)))(folded)

    def prior(self, noise):
        return jnp.full(noise.shape[:-1], MASK)

    def forward(self, x_0, t, noise):
        masked = noise[..., 0] < jnp.reshape(t / self.num_steps, (-1, 1))
        return jnp.where(masked, MASK, x_0)

    def memory(self, x_t):
        return ()

    def reverse(self, denoiser, x_t, step, noise, memory):
        found, u = denoiser(x_t, jnp.broadcast_to(step.t, x_t.shape[:1])), noise()
        drawn = (u[..., :1] > found.probability.cumsum(axis=-1)[..., :-1]).sum(axis=-1)
        now = (x_t == MASK) & (u[..., 1] < (step.t - step.s) / step.t)
        return StepResult(jnp.where(now, drawn, x_t), found)

    def prior_term(self, x_0, t):
        return jnp.zeros(len(x_0))

    def step_term(self, x_0, x_t, t, s, prediction):
        known = jnp.take_along_axis(prediction.probability, x_0[..., None], axis=-1)[..., 0]
        bits = jnp.where(x_t == MASK, -jnp.log2(known), 0.0)
        return (t - s) / t * bits.mean(axis=-1)

    def decoder_term(self, x_0, x_t, t, prediction):
        return self.step_term(x_0, x_t, t, 0, prediction)

    def distortion(self, x_0, prediction):
        return ((x_0 - prediction.x_0) ** 2).mean(axis=-1)


def test_a_discrete_process_is_sampled_by_the_same_driver():
    process: Process = Masking()
    n = 40_000
    chain = jax.jit(
        lambda key: run_chain(key, process, exact, (n, 2), times(T), snapshots=T)[:1] + (0,)
    )(jax.random.key(0))
    x_0 = np.asarray(chain[0])
    found = np.zeros((LEVELS, LEVELS))
    np.add.at(found, tuple(x_0.T), 1 / n)
    expected = (1 - 1 / T) * JOINT + np.outer(JOINT.sum(axis=1), JOINT.sum(axis=0)) / T
    assert np.abs(found - expected).max() < 4 * np.sqrt(0.25 / n)
    assert found[2, 0] > 0.005  # which p alone never is


def test_snapshots_of_a_discrete_chain_are_whole_and_unmasked_in_turn():
    chain = jax.jit(lambda key: run_chain(key, Masking(), exact, (50, 2), times(T), snapshots=T))(
        jax.random.key(1)
    )
    x_t = np.asarray(chain.x_t)
    assert x_t.dtype.kind == "i"
    assert (x_t[0] == MASK).all()
    assert (np.diff((x_t == MASK).sum(axis=(1, 2))) <= 0).all()
    assert (np.asarray(chain.x_0) < MASK).all()
    assert chain.predicted_x_0.shape == x_t.shape
    assert int(chain.evaluations) == T


def test_the_bound_of_a_discrete_process_is_its_closed_form():
    rng = np.random.default_rng(0)
    n = 40_000
    x_0 = np.stack(np.unravel_index(rng.choice(9, n, p=JOINT.ravel()), (3, 3)), axis=1)
    found = jax.jit(lambda x, key: likelihood.bound(Masking(), exact, x, key))(
        x_0, jax.random.key(0)
    )
    joint = -np.sum(JOINT[JOINT > 0] * np.log2(JOINT[JOINT > 0]))
    marginals = sum(-np.sum(p * np.log2(p)) for p in (JOINT.sum(axis=0), JOINT.sum(axis=1)))
    expected = (joint + (marginals - joint) / T) / 2  # of two dimensions
    total = np.asarray(found.total, np.float64)
    assert abs(total.mean() - expected) < 4 * total.std() / np.sqrt(n)
    assert found.steps.shape == (n, T - 1)
    assert not np.asarray(found.prior).any()


def test_a_gaussian_process_is_what_samples_and_bounds_are_made_of():
    """Ancestral steps and the bound's terms, with no sampler and by the functions of the paper."""
    schedule, key = schedules.linear(10), jax.random.key(2)

    def denoise(x_t, t):
        from ddpm.diffusion.predictions import from_eps

        return from_eps(schedule, x_t, t, 0.5 * x_t)

    process: Process = GaussianDiffusion(schedule)
    shape = (4, 3)
    found = jax.jit(lambda key: run_chain(key, process, denoise, shape, times(10)))(key)
    expected = jax.jit(
        lambda key: sample_chain(key, schedule, denoise, shape, sampler=ancestral(), snapshots=0)
    )(key)
    assert np.asarray(found.x_0).tobytes() == np.asarray(expected.x_0).tobytes()
    x_0 = np.float32(np.random.default_rng(0).integers(0, 256, shape) / 127.5 - 1)
    found = jax.jit(lambda *xs: likelihood.bound(process, denoise, *xs))(x_0, key)
    expected = jax.jit(lambda *xs: likelihood.bits_per_dim(schedule, denoise, *xs))(x_0, key)
    for a, b in zip(found, expected, strict=True):
        close(a, b, rtol=0)
